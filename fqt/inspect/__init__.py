"""Looking at a model: what was decided for each layer, and what it costs in time and memory."""
