"""Start from something: static ranges for a converted model, and weights rounded by what its layers' outputs say."""
