import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import org.apache.kafka.streams.processor.api.Processor;
import org.apache.kafka.streams.processor.api.ProcessorContext;
import org.apache.kafka.streams.processor.api.Record;
import org.apache.kafka.streams.state.KeyValueStore;

/** One record per sample, one read and one write of the store for each. */
final class RecordFold implements Processor<byte[], RecordFold.Sample, Void, Void> {
    /** 272 bytes, little-endian: the vector, its time, its weight. */
    record Sample(float[] vector, double time, double weight) {
        static Sample decode(String topic, byte[] data) {
            ByteBuffer buffer = ByteBuffer.wrap(data).order(ByteOrder.LITTLE_ENDIAN);
            float[] vector = new float[State.DIM];
            buffer.asFloatBuffer().get(vector);
            return new Sample(vector, buffer.getDouble(4 * State.DIM), buffer.getDouble(4 * State.DIM + 8));
        }
    }

    private KeyValueStore<byte[], State> means;

    @Override
    public void init(ProcessorContext<Void, Void> context) {
        means = context.getStateStore(Peer.STORE);
    }

    @Override
    public void process(Record<byte[], Sample> record) {
        State state = means.get(record.key());
        if (state == null) {
            state = new State();
        }
        Sample sample = record.value();
        state.fold(sample.vector(), 0, sample.time(), sample.weight(), 1);
        means.put(record.key(), state);
        Progress.add(1);
    }
}
