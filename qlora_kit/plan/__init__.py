"""What a recipe will need, told before anything is loaded or trained."""
