import java.lang.invoke.MethodHandles;
import java.lang.invoke.VarHandle;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.Arrays;

/**
 * A reader of crossrep's frames (docs/formats.md) that have one column of float16 or float32 vectors.
 *
 * One object reads frame after frame into the same arrays, so that a frame costs no garbage. It checks only what it needs.
 */
final class Frame {
    private static final VarHandle INT = MethodHandles.byteArrayViewVarHandle(int[].class, ByteOrder.LITTLE_ENDIAN);
    private static final VarHandle LONG = MethodHandles.byteArrayViewVarHandle(long[].class, ByteOrder.LITTLE_ENDIAN);
    private static final VarHandle DOUBLE = MethodHandles.byteArrayViewVarHandle(double[].class, ByteOrder.LITTLE_ENDIAN);

    byte[] data;
    int rows;
    float[] vectors = new float[0]; // row after row
    private short[] halves = new short[0];
    private int position;
    // Where the columns begin in `data`; 0 where a column is left out, which means 1 each.
    private int offsets;
    private int keys;
    private int times;
    private int counts;
    private int weights;

    int keyStart(int row) {
        return keys + (int) INT.get(data, offsets + 4 * row);
    }

    double time(int row) {
        return (double) DOUBLE.get(data, times + 8 * row);
    }

    double weight(int row) {
        return weights == 0 ? 1.0 : (double) DOUBLE.get(data, weights + 8 * row);
    }

    long count(int row) {
        return counts == 0 ? 1 : (long) LONG.get(data, counts + 8 * row);
    }

    void read(byte[] frame) {
        data = frame;
        if (data[0] != (byte) 0xC3 || data[1] != 1) {
            throw new IllegalArgumentException("no frame");
        }
        position = 10 + 8; // the header, the space's hash
        bytes(); // the entity
        rows = varint();
        offsets = bytes();
        keys = bytes();
        times = bytes();
        counts = bytes();
        if (items() != 1) {
            throw new IllegalArgumentException("one block of vectors was expected");
        }
        boolean half = varint() == 0;
        if (varint() != State.DIM) {
            throw new IllegalArgumentException("another dim");
        }
        widen(bytes(), half);
        if (varint() != 0 || items() != 1) {
            throw new IllegalArgumentException("one column was expected");
        }
        bytes(); // its name
        if (bytes() != 0) {
            throw new IllegalArgumentException("every row must have the column");
        }
        weights = bytes();
        int own = bytes();
        times = own == 0 ? times : own;
    }

    private void widen(int start, boolean half) {
        int n = rows * State.DIM;
        if (vectors.length < n) {
            vectors = new float[n];
            halves = new short[n];
        }
        ByteBuffer values = ByteBuffer.wrap(data, start, n * (half ? 2 : 4)).slice().order(ByteOrder.LITTLE_ENDIAN);
        if (!half) {
            values.asFloatBuffer().get(vectors, 0, n);
            return;
        }
        values.asShortBuffer().get(halves, 0, n);
        for (int i = 0; i < n; i++) { // one vector instruction for eight or sixteen of them
            vectors[i] = Float.float16ToFloat(halves[i]);
        }
    }

    /** Skip a string or bytes, and say where it begins; 0 if it is empty. */
    private int bytes() {
        int length = varint();
        int start = position;
        position += length;
        return length == 0 ? 0 : start;
    }

    /** The number of items of an array's block. */
    private int items() {
        int count = varint();
        if (count < 0) {
            varint(); // its size in bytes
        }
        return Math.abs(count);
    }

    private int varint() {
        int shift = 0;
        long value = 0;
        byte part;
        do {
            part = data[position++];
            value |= (long) (part & 0x7F) << shift;
            shift += 7;
        } while (part < 0);
        return (int) (value >>> 1 ^ -(value & 1));
    }

    byte[] key(int row) {
        return Arrays.copyOfRange(data, keyStart(row), keyStart(row + 1));
    }
}
