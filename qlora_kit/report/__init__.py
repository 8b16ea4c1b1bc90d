"""What a run tells a person, without saying how it is shown."""
