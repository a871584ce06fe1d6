"""The Lightning side: the Trainer's names, calls of the user's step that the run does not notice, held-out batches."""
