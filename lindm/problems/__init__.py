"""Decision problems: validation of a user's arrays, random draws, and file formats."""
