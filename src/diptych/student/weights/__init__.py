"""Weights in every layout: opened, folded, merged with LoRAs, converted and exported."""
