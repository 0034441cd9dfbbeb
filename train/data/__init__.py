"""Images of faces: folders, RecordIO, shards; batches of them."""
