"""The study `retrieval`: which layouts with half of the cache look things up best, at what loss."""
