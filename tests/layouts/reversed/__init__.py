"""The smallest layout: records as in grouped layers, the last expert first. A test makes a new layout of it."""
