"""Components to one untrained model: language model, aligned encoder, projector, warm start. Nothing is optimized by gradient here."""
