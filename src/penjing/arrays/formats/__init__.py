"""Number formats on arrays: encoding, decoding, packing, and the choice of scales."""
