"""The wardrobe: adapter files, their store, and the slot bank."""
