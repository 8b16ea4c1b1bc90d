"""What a finished run becomes: a merged model, measured and certified; a dense checkpoint."""
