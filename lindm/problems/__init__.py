"""Where tasks are born: each module draws problems of one kind and checks the ones that users bring."""
