import java.util.concurrent.atomic.LongAdder;

/** How many rows were processed, all threads together. The first is announced on stdout, which the benchmark watches. */
final class Progress {
    private static final LongAdder ROWS = new LongAdder();
    private static volatile boolean begun;

    static void add(long rows) {
        if (!begun) {
            begin();
        }
        ROWS.add(rows);
    }

    static long rows() {
        return ROWS.sum();
    }

    private static synchronized void begin() {
        if (!begun) {
            begun = true;
            System.out.printf("first %.3f%n", System.currentTimeMillis() / 1000.0);
        }
    }
}
