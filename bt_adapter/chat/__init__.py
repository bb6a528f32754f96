"""Video chat: a branch attached to an image chat model, prompts with the right number of video tokens, an engine."""
