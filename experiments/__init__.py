"""Where what is measured (`lindm`) meets what is predicted (`theory`): one question per module."""
