"""An HTTP server for a video chat model, with OpenAI's chat completions (extra ``[serve]``)."""
