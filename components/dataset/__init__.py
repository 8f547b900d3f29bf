"""Stage `dataset`: turns any data set into train and eval prompts, tokenised once for the policy."""
