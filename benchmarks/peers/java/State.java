import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import org.apache.kafka.common.serialization.Serde;
import org.apache.kafka.common.serialization.Serdes;

/** What is kept of a key, as a user of Kafka Streams would write it: a class with a Serde. 280 bytes, little-endian. */
final class State {
    static final int DIM = 64;
    static final int BYTES = 24 + 4 * DIM;
    static final Serde<State> SERDE = Serdes.serdeFrom((topic, state) -> state.encode(), (topic, data) -> data == null ? null : decode(data));
    private static final double RATE = Math.log(2) / (3 * 86400); // half-life: 3 days

    long count;
    double time = Double.NEGATIVE_INFINITY;
    double weight;
    final float[] mean = new float[DIM];

    /** How much of a weight is left so many seconds later. */
    static double decay(double since) {
        return Math.exp(-since * RATE);
    }

    /** Fold the row `vectors[at : at + DIM]` in. */
    void fold(float[] vectors, int at, double rowTime, double rowWeight, long rowCount) {
        double alpha = weight;
        double gamma = rowWeight;
        if (rowTime >= time) {
            alpha *= decay(rowTime - time); // exp(-infinity) of a new key is 0
            time = rowTime;
        } else {
            gamma *= decay(time - rowTime);
        }
        weight = alpha + gamma;
        count += rowCount;
        float share = (float) (gamma / weight);
        for (int d = 0; d < DIM; d++) {
            mean[d] += share * (vectors[at + d] - mean[d]);
        }
    }

    byte[] encode() {
        ByteBuffer buffer = ByteBuffer.allocate(BYTES).order(ByteOrder.LITTLE_ENDIAN).putLong(count).putDouble(time).putDouble(weight);
        buffer.asFloatBuffer().put(mean);
        return buffer.array();
    }

    static State decode(byte[] data) {
        ByteBuffer buffer = ByteBuffer.wrap(data).order(ByteOrder.LITTLE_ENDIAN);
        State state = new State();
        state.count = buffer.getLong();
        state.time = buffer.getDouble();
        state.weight = buffer.getDouble();
        buffer.asFloatBuffer().get(state.mean);
        return state;
    }
}
