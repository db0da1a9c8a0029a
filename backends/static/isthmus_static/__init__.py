"""For backends that compile static shapes: buckets, artefact cache, warm-up.  Nothing is here yet."""
