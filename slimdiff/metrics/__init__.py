"""The field's figures of merit for pictures, one a file: CLIP score, FID, LPIPS."""
