#pragma once
// Host clusters: handing them out, and taking them back when nothing can depend on them any more.

#include <atomic>
#include <deque>
#include <mutex>
#include <vector>

#include "base/epochs.h"
#include "qcow2/refcounts.h"

namespace qcow::qcow2 {

/// Clusters are reserved in runs: counted, made zeros, and both made durable, before the first of them is handed out.
/// So the mapping may refer to them at any time without a flush of its own, and what a crash leaves is a leak at worst.
///
/// A cluster that is no longer referred to is retired. It is free again, and may be punched, only once a flush that
/// began after that has made the last change durable, and every request that could still be using it is done.
///
/// Thread-safe.
class Allocator {
public:
    Allocator(Core& core, WriteBack& write_back, MetadataMap& metadata, Epochs& epochs, bool punch)
        : core_(core),
          write_back_(write_back),
          metadata_(metadata),
          epochs_(epochs),
          punch_(punch),
          cluster_bits_(core.header.cluster_bits),
          refcounts_(core, write_back, metadata) {}

    /// Reads the refcount table.
    Result<void> load();

    /// 1 to `wanted` clusters one behind the other. They read as zeros.
    Result<ClusterRun> take(std::uint64_t wanted);

    /// Exactly `count` of them.
    Result<ClusterRun> take_contiguous(std::uint64_t count);

    /// Room for a compressed stream of `length` bytes, behind the previous one where it fits. Whoever refers to it must
    /// do so behind a barrier: a cluster that streams share is not yet counted durably.
    Result<HostOffset> take_bytes(std::uint64_t length);

    /// The caller has just dropped a reference to each of these clusters, or never made one.
    void retire(ClusterRun run);
    /// The same for the bytes of a compressed stream.
    void retire_stream(const format::CompressedRange& range);
    /// The same, of L1 and L2 tables.
    void retire_table(HostOffset at, std::uint64_t length);

    /// Bytes of clusters retired since the last flush.
    [[nodiscard]] std::uint64_t retired_bytes() const {
        return retired_clusters_.load(std::memory_order_relaxed) << cluster_bits_;
    }

    struct RetiredRun {
        ClusterRun run;
        std::uint64_t epoch = 0;  // after it was taken out of the mapping
        bool table = false;
    };
    using Retired = std::vector<RetiredRun>;
    /// To be called before a flush; its result after it, if it succeeded.
    [[nodiscard]] Retired begin_flush();
    Result<void> end_flush(Retired retired);
    /// Where it failed.
    void flush_failed(Retired retired);

    /// Gives back what is reserved, and cuts it off the end of the file. No request may be in flight.
    Result<void> give_back();

    /// Makes each refcount what the references come to. Nothing else may be in flight. Errc::corrupt where references
    /// cannot be counted, io.
    Result<void> rebuild();

private:
    Result<void> reserve();
    Result<std::vector<ClusterRun>> find_runs(std::uint64_t wanted);
    [[nodiscard]] Result<std::uint64_t> tail() const;
    Result<void> find_counted_end();
    Result<void> commit_reservation(std::vector<ClusterRun> runs);
    Result<void> release(const RetiredRun& retired);
    void add_retired(ClusterRun run, bool table);

    Core& core_;
    WriteBack& write_back_;
    MetadataMap& metadata_;
    Epochs& epochs_;
    bool punch_;
    unsigned cluster_bits_;

    std::mutex mutex_;  // of all that follows, up to the other one
    Refcounts refcounts_;
    std::deque<ClusterRun> reserved_;
    std::uint64_t next_reservation_ = 0;  // clusters; grows with use
    std::uint64_t search_from_ = 0;       // no cluster before it is free
    std::uint64_t counted_end_ = 0;       // a file cut short may have refcounts past its end
    HostOffset stream_end_;               // where the next compressed stream may go on; 0: nowhere

    std::atomic<std::uint64_t> retired_clusters_ = 0;
    std::mutex retired_mutex_;
    std::vector<RetiredRun> retired_;  // since the last flush began
    std::mutex durable_mutex_;
    std::vector<RetiredRun> durable_;  // dropped durably, but maybe in use by a request still
};

}  // namespace qcow::qcow2
