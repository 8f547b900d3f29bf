"""Stage `reward`: scores completions with reward functions that run apart, without credentials or network."""
