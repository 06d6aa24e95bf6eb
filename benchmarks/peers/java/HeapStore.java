import java.lang.invoke.MethodHandles;
import java.lang.invoke.VarHandle;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import org.apache.kafka.common.utils.Bytes;
import org.apache.kafka.streams.KeyValue;
import org.apache.kafka.streams.processor.StateStore;
import org.apache.kafka.streams.processor.StateStoreContext;
import org.apache.kafka.streams.query.Position;
import org.apache.kafka.streams.state.KeyValueStore;
import org.apache.kafka.streams.state.internals.CacheFlushListener;
import org.apache.kafka.streams.state.internals.CachedStateStore;

/**
 * A write-back cache on the heap in front of Kafka Streams' own logged RocksDB store: states live decoded, in arrays, and a commit encodes
 * and writes those that changed since the last. Means are float64 here, float32 in the store and its changelog.
 *
 * Kafka Streams empties caches before a commit's records are sent only through the internal interface CachedStateStore: `flush()` comes
 * after the commit. Nothing is ever evicted: the benchmark's keys fit the heap.
 */
final class HeapStore implements StateStore, CachedStateStore<Bytes, byte[]> {
    private static final int CHUNK = 1024; // slots whose means share one array: growing then copies no means
    private static final int BATCH = 4096; // states encoded and written at once: more would only live longer on the heap
    private static final VarHandle LONG = MethodHandles.byteArrayViewVarHandle(long[].class, ByteOrder.LITTLE_ENDIAN);

    private final KeyValueStore<Bytes, byte[]> inner;

    // An open-addressing table from key to slot. A key is at most 8 bytes, packed into a long; 0 marks a free place.
    private long[] table = new long[1 << 16];
    private int[] tableSlots = new int[1 << 16];

    private int size;
    private double[][] means = new double[0][];
    private long[] keys = new long[CHUNK];
    private long[] counts = new long[CHUNK];
    private double[] times = new double[CHUNK];
    private double[] weights = new double[CHUNK];
    private boolean[] isDirty = new boolean[CHUNK];
    private int[] dirty = new int[CHUNK];
    private int dirtySize;

    HeapStore(KeyValueStore<Bytes, byte[]> inner) {
        this.inner = inner;
    }

    /** The slot of a key, read from the inner store if it is not on the heap yet. */
    int slot(byte[] data, int start, int length) {
        long key = pack(data, start, length);
        int mask = table.length - 1;
        int place = hash(key) & mask;
        while (table[place] != key) {
            if (table[place] == 0) {
                return load(key, place);
            }
            place = place + 1 & mask;
        }
        return tableSlots[place];
    }

    /** Fold the row `vectors[at : at + DIM]` into a slot. */
    void fold(int slot, float[] vectors, int at, double time, double weight, long count) {
        double alpha = weights[slot];
        double gamma = weight;
        double since = time - times[slot];
        if (since >= 0) {
            alpha *= State.decay(since);
            times[slot] = time;
        } else {
            gamma *= State.decay(-since);
        }
        double total = alpha + gamma;
        weights[slot] = total;
        counts[slot] += count;
        double share = gamma / total;
        double[] mean = means[slot / CHUNK];
        int from = slot % CHUNK * State.DIM;
        for (int d = 0; d < State.DIM; d++) {
            double old = mean[from + d];
            mean[from + d] = old + share * (vectors[at + d] - old);
        }
        if (!isDirty[slot]) {
            isDirty[slot] = true;
            dirty[dirtySize++] = slot;
        }
    }

    @Override
    public void flushCache() {
        List<KeyValue<Bytes, byte[]>> entries = new ArrayList<>(BATCH);
        for (int i = 0; i < dirtySize; i++) {
            isDirty[dirty[i]] = false;
            entries.add(KeyValue.pair(Bytes.wrap(unpack(keys[dirty[i]])), encode(dirty[i])));
            if (entries.size() == BATCH || i == dirtySize - 1) {
                inner.putAll(entries); // one RocksDB batch, and one changelog record each
                entries.clear();
            }
        }
        dirtySize = 0;
    }

    private byte[] encode(int slot) {
        ByteBuffer buffer = ByteBuffer.allocate(State.BYTES).order(ByteOrder.LITTLE_ENDIAN);
        buffer.putLong(counts[slot]).putDouble(times[slot]).putDouble(weights[slot]);
        float[] mean = new float[State.DIM];
        double[] exact = means[slot / CHUNK];
        int from = slot % CHUNK * State.DIM;
        for (int d = 0; d < State.DIM; d++) {
            mean[d] = (float) exact[from + d];
        }
        buffer.asFloatBuffer().put(mean);
        return buffer.array();
    }

    private int load(long key, int place) {
        byte[] stored = inner.get(Bytes.wrap(unpack(key)));
        int slot = size++;
        if (slot == keys.length) {
            grow();
        }
        if (slot / CHUNK == means.length) {
            means = Arrays.copyOf(means, means.length + 1);
            means[slot / CHUNK] = new double[CHUNK * State.DIM];
        }
        keys[slot] = key;
        times[slot] = Double.NEGATIVE_INFINITY;
        if (stored != null) {
            State state = State.decode(stored);
            counts[slot] = state.count;
            times[slot] = state.time;
            weights[slot] = state.weight;
            for (int d = 0; d < State.DIM; d++) {
                means[slot / CHUNK][slot % CHUNK * State.DIM + d] = state.mean[d];
            }
        }
        table[place] = key;
        tableSlots[place] = slot;
        if (size > table.length / 2) {
            rehash();
        }
        return slot;
    }

    private void grow() {
        int room = 2 * keys.length;
        keys = Arrays.copyOf(keys, room);
        counts = Arrays.copyOf(counts, room);
        times = Arrays.copyOf(times, room);
        weights = Arrays.copyOf(weights, room);
        isDirty = Arrays.copyOf(isDirty, room);
        dirty = Arrays.copyOf(dirty, room);
    }

    private void rehash() {
        int mask = 2 * table.length - 1;
        table = new long[mask + 1];
        tableSlots = new int[mask + 1];
        for (int slot = 0; slot < size; slot++) {
            int place = hash(keys[slot]) & mask;
            while (table[place] != 0) {
                place = place + 1 & mask;
            }
            table[place] = keys[slot];
            tableSlots[place] = slot;
        }
    }

    private static int hash(long key) {
        long mixed = key * 0x9E3779B97F4A7C15L;
        return (int) (mixed ^ mixed >>> 32);
    }

    /** A key of up to 8 bytes as a number. Behind the keys of a frame lie its times, so 8 bytes can always be read. */
    private static long pack(byte[] data, int start, int length) {
        if (length > 8) {
            throw new IllegalArgumentException("this benchmark's keys have at most 8 bytes");
        }
        return (long) LONG.get(data, start) & -1L >>> 64 - 8 * length;
    }

    private static byte[] unpack(long key) {
        byte[] data = new byte[8 - Long.numberOfLeadingZeros(key) / 8];
        for (int i = 0; i < data.length; i++) {
            data[i] = (byte) (key >>> 8 * i);
        }
        return data;
    }

    @Override
    public void clearCache() {
        Arrays.fill(table, 0);
        means = new double[0][];
        Arrays.fill(counts, 0);
        Arrays.fill(weights, 0);
        Arrays.fill(isDirty, false);
        size = 0;
        dirtySize = 0;
    }

    @Override
    public boolean setFlushListener(CacheFlushListener<Bytes, byte[]> listener, boolean sendOldValues) {
        return false;
    }

    @Override
    public String name() {
        return inner.name();
    }

    @Override
    public void init(StateStoreContext context, StateStore root) {
        inner.init(context, root);
    }

    @Override
    public void flush() {
        inner.flush();
    }

    @Override
    public void close() {
        inner.close();
    }

    @Override
    public boolean persistent() {
        return inner.persistent();
    }

    @Override
    public boolean isOpen() {
        return inner.isOpen();
    }

    @Override
    public Position getPosition() {
        return inner.getPosition();
    }
}
