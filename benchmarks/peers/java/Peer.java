import java.io.Reader;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Map;
import java.util.Properties;
import org.apache.kafka.common.serialization.ByteArrayDeserializer;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.Topology;
import org.apache.kafka.streams.errors.StreamsUncaughtExceptionHandler.StreamThreadExceptionResponse;
import org.apache.kafka.streams.state.Stores;

/**
 * The benchmark's work in Kafka Streams: `Peer records|frames|frames-heap TOPIC ROWS SETTINGS`, the last a file of Kafka Streams' own settings.
 *
 * It stops, which commits, once it has processed so many rows: a long commit interval is no disadvantage. Then it waits for stdin's end, so that
 * its CPU time and memory can be read.
 */
public final class Peer {
    static final String STORE = "means";

    public static void main(String[] args) throws Exception {
        long rows = Long.parseLong(args[2]);
        Properties settings = new Properties();
        try (Reader reader = Files.newBufferedReader(Path.of(args[3]))) {
            settings.load(reader);
        }
        KafkaStreams streams = new KafkaStreams(topology(args[0], args[1]), settings);
        streams.setUncaughtExceptionHandler(error -> {
            error.printStackTrace();
            return StreamThreadExceptionResponse.SHUTDOWN_CLIENT;
        });
        streams.start();
        while (Progress.rows() < rows) {
            if (streams.state() == KafkaStreams.State.ERROR) {
                System.exit(1);
            }
            Thread.sleep(2);
        }
        streams.close();
        System.in.read();
    }

    private static Topology topology(String mode, String topic) {
        Topology topology = new Topology();
        ByteArrayDeserializer raw = new ByteArrayDeserializer();
        if (mode.equals("records")) {
            topology.addSource("rows", raw, RecordFold.Sample::decode, topic);
            topology.addProcessor("fold", RecordFold::new, "rows");
        } else {
            topology.addSource("rows", raw, raw, topic);
            topology.addProcessor("fold", mode.equals("frames") ? FrameFold::new : HeapFold::new, "rows");
        }
        var supplier = Stores.persistentKeyValueStore(STORE);
        if (mode.equals("frames-heap")) {
            var inner = Stores.keyValueStoreBuilder(supplier, Serdes.Bytes(), Serdes.ByteArray()).withLoggingEnabled(Map.of());
            return topology.addStateStore(new HeapStoreBuilder(inner), "fold");
        }
        var store = Stores.keyValueStoreBuilder(supplier, Serdes.ByteArray(), State.SERDE).withCachingEnabled().withLoggingEnabled(Map.of());
        return topology.addStateStore(store, "fold");
    }
}
