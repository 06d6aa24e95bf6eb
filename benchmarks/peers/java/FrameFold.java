import org.apache.kafka.streams.processor.api.Processor;
import org.apache.kafka.streams.processor.api.ProcessorContext;
import org.apache.kafka.streams.processor.api.Record;
import org.apache.kafka.streams.state.KeyValueStore;

/** Frames of many rows, with Kafka Streams' own store: one read and one write for each row. */
final class FrameFold implements Processor<byte[], byte[], Void, Void> {
    private final Frame frame = new Frame();
    private KeyValueStore<byte[], State> means;

    @Override
    public void init(ProcessorContext<Void, Void> context) {
        means = context.getStateStore(Peer.STORE);
    }

    @Override
    public void process(Record<byte[], byte[]> record) {
        frame.read(record.value());
        for (int row = 0; row < frame.rows; row++) {
            byte[] key = frame.key(row);
            State state = means.get(key);
            if (state == null) {
                state = new State();
            }
            state.fold(frame.vectors, row * State.DIM, frame.time(row), frame.weight(row), frame.count(row));
            means.put(key, state);
        }
        Progress.add(frame.rows);
    }
}
