import org.apache.kafka.streams.processor.api.Processor;
import org.apache.kafka.streams.processor.api.ProcessorContext;
import org.apache.kafka.streams.processor.api.Record;

/** Frames of many rows, folded into a {@link HeapStore}. */
final class HeapFold implements Processor<byte[], byte[], Void, Void> {
    private final Frame frame = new Frame();
    private int[] slots = new int[0];
    private HeapStore means;

    @Override
    public void init(ProcessorContext<Void, Void> context) {
        means = context.getStateStore(Peer.STORE);
    }

    @Override
    public void process(Record<byte[], byte[]> record) {
        frame.read(record.value());
        if (slots.length < frame.rows) {
            slots = new int[frame.rows];
        }
        // All look-ups first: the processor then overlaps their cache misses.
        for (int row = 0; row < frame.rows; row++) {
            int start = frame.keyStart(row);
            slots[row] = means.slot(frame.data, start, frame.keyStart(row + 1) - start);
        }
        for (int row = 0; row < frame.rows; row++) {
            means.fold(slots[row], frame.vectors, row * State.DIM, frame.time(row), frame.weight(row), frame.count(row));
        }
        Progress.add(frame.rows);
    }
}
