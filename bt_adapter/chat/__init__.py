"""Video chat: attach a branch to an image chat model, build prompts with video tokens, and answer questions."""
