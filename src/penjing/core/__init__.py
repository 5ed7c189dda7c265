"""The values and the flow; needs no framework and no other part of Penjing."""
