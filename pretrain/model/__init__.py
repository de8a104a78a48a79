"""The encoder: attention layout, attention, rotary embedding, blocks."""
