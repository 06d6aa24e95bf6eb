"""The workers (infer, frame, fold, samples), their topics and broker, publishing, the proof, operations, the demo."""
