import java.util.Map;
import org.apache.kafka.common.utils.Bytes;
import org.apache.kafka.streams.state.KeyValueStore;
import org.apache.kafka.streams.state.StoreBuilder;

/** Makes {@link HeapStore}s; name, logging and topic settings are those of the store within. */
final class HeapStoreBuilder implements StoreBuilder<HeapStore> {
    private final StoreBuilder<KeyValueStore<Bytes, byte[]>> inner;

    HeapStoreBuilder(StoreBuilder<KeyValueStore<Bytes, byte[]>> inner) {
        this.inner = inner;
    }

    @Override
    public HeapStore build() {
        return new HeapStore(inner.build());
    }

    @Override
    public StoreBuilder<HeapStore> withCachingEnabled() {
        return this;
    }

    @Override
    public StoreBuilder<HeapStore> withCachingDisabled() {
        return this;
    }

    @Override
    public StoreBuilder<HeapStore> withLoggingEnabled(Map<String, String> config) {
        inner.withLoggingEnabled(config);
        return this;
    }

    @Override
    public StoreBuilder<HeapStore> withLoggingDisabled() {
        inner.withLoggingDisabled();
        return this;
    }

    @Override
    public Map<String, String> logConfig() {
        return inner.logConfig();
    }

    @Override
    public boolean loggingEnabled() {
        return inner.loggingEnabled();
    }

    @Override
    public String name() {
        return inner.name();
    }
}
