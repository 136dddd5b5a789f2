"""The user-state cache: pages, index, policies and host tier; and the cache of item vectors."""
