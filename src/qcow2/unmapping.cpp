#include "qcow2/unmapping.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <mutex>
#include <set>
#include <unordered_set>
#include <vector>

#include "base/endian.h"
#include "base/try.h"
#include "qcow2/sound_visitor.h"

namespace qcow::qcow2 {
namespace {

using format::L2Entry;

constexpr std::uint64_t unmapped_piece_bytes = 64 * KiB;

/// Whether all of these bytes of the file are zeros.
Result<bool> holds_zeros(const Storage& file, HostOffset at, std::uint64_t length) {
    thread_local std::vector<std::byte> buffer;
    while (length > 0) {
        const auto run = TRY(file.run(at, length));
        for (std::uint64_t done = 0; run.data && done < run.length;) {
            buffer.resize(std::min(run.length - done, unmapped_piece_bytes));
            TRY(file.read(at + done, buffer));
            if (!is_zero(buffer)) return false;
            done += buffer.size();
        }
        at += run.length;
        length -= run.length;
    }
    return true;
}

/// Whether these encrypted guest bytes are zeros.
Result<bool> decrypts_to_zeros(const DataFile& data, HostOffset host, GuestOffset at, std::uint64_t length) {
    thread_local std::vector<std::byte> buffer;
    for (std::uint64_t done = 0; done < length; done += buffer.size()) {
        buffer.resize(std::min(length - done, unmapped_piece_bytes));
        TRY_VOID(data.read(host + done, at + done, std::span(buffer)));
        if (!is_zero(buffer)) return false;
    }
    return true;
}

/// Changes the entries of data clusters, and keeps the L2 tables that lead to some.
class ClusterVisitor : public SoundVisitor {
public:
    ClusterVisitor(const Metadata& metadata, const DataFile& data, bool zeroes)
        : SoundVisitor(metadata),
          data_(data),
          unmaps_(zeroes && (metadata.header().version >= 3 || metadata.header().backing_name.empty())) {}

    Result<void> reference(const Reference& reference) override {
        if (reference.kind == Structure::compressed) keep(reference.place.table);
        if (reference.kind != Structure::data) return {};
        const auto& geometry = metadata_.geometry();
        const std::uint64_t entry_bytes = std::uint64_t{8} * geometry.entry_words();
        const std::uint64_t count = reference.bytes >> geometry.cluster_bits;
        std::vector<std::byte> entries(count * entry_bytes);
        if (unmaps_) TRY(metadata_.file().read(reference.place.at, entries));
        bool kept = !unmaps_;
        for (std::uint64_t i = 0; unmaps_ && i < count; ++i) {
            L2Entry entry{load_be<std::uint64_t>(entries, i * entry_bytes)};
            if (geometry.extended_l2) entry.bitmap = load_be<std::uint64_t>(entries, i * entry_bytes + 8);
            if (TRY(reads_zeros(entry, *reference.place.guest + i * geometry.cluster_size()))) {
                TRY_VOID(unmap(reference.place.at + i * entry_bytes, entry));
            } else {
                kept = true;
            }
        }
        if (kept) keep(reference.place.table);
        return {};
    }

    [[nodiscard]] bool changed() const { return changed_; }
    /// Whether an L2 table leads to data.
    [[nodiscard]] bool is_kept(HostOffset table) const { return kept_.contains(table.value); }

private:
    void keep(HostOffset table) {
        const std::lock_guard lock(mutex_);
        kept_.insert(table.value);
    }

    [[nodiscard]] Result<bool> are_zeros(HostOffset host, GuestOffset at, std::uint64_t length) const {
        return data_.is_encrypted() ? decrypts_to_zeros(data_, host, at, length)
                                    : holds_zeros(metadata_.file(), host, length);
    }

    /// Whether all data of the entry's cluster are zeros. `at`: the first byte that it maps.
    [[nodiscard]] Result<bool> reads_zeros(L2Entry entry, GuestOffset at) const {
        const auto& geometry = metadata_.geometry();
        if (!geometry.extended_l2) {
            if (metadata_.rules().run(entry, 0).kind == format::ClusterKind::zero_allocated) return true;
            return are_zeros(entry.cluster(), at, geometry.cluster_size());
        }
        const std::uint64_t unit = bit(geometry.subcluster_bits());
        for (auto allocated = static_cast<std::uint32_t>(entry.bitmap); allocated != 0; allocated &= allocated - 1) {
            const auto index = static_cast<std::uint64_t>(std::countr_zero(allocated));
            if (!TRY(are_zeros(entry.cluster() + index * unit, at + index * unit, unit))) return false;
        }
        return true;
    }

    /// Writes the entry without its cluster.
    Result<void> unmap(HostOffset at, L2Entry entry) {
        changed_ = true;
        std::array<std::byte, 16> bytes = {};
        if (metadata_.geometry().extended_l2) {
            store_be(bytes, 8, (entry.bitmap << 32) | (entry.bitmap & ~low_bits(32)));
            return metadata_.file().write(at, bytes);
        }
        store_be(bytes, 0, metadata_.header().version >= 3 ? format::zero_bit : std::uint64_t{0});
        return metadata_.file().write(at, std::span(bytes).first(8));
    }

    const DataFile& data_;
    const bool unmaps_;
    std::atomic<bool> changed_ = false;
    std::mutex mutex_;
    std::unordered_set<std::uint64_t> kept_;
};

/// Clears the L1 entries that lead to tables without data.
class TableVisitor : public SoundVisitor {
public:
    TableVisitor(const Metadata& metadata, const ClusterVisitor& clusters, bool zeroes)
        : SoundVisitor(metadata), clusters_(clusters), drops_zeros_(zeroes && metadata.header().backing_name.empty()) {}

    Result<void> reference(const Reference& reference) override {
        if (reference.kind != Structure::l2_table || clusters_.is_kept(reference.at)) return {};
        if (!drops_zeros_ && !dropped_.contains(reference.at)) {
            if (!TRY(holds_zeros(metadata_.file(), reference.at, reference.bytes))) return {};
            dropped_.insert(reference.at);
        }
        changed_ = true;
        constexpr std::array<std::byte, 8> none = {};
        return metadata_.file().write(reference.place.at, none);
    }

    [[nodiscard]] bool changed() const { return changed_; }

private:
    const ClusterVisitor& clusters_;
    const bool drops_zeros_;
    std::set<HostOffset> dropped_;
    bool changed_ = false;
};

}  // namespace

Result<bool> unmap_zeros(const Metadata& metadata, const DataFile& data, const UnmapOptions& options) {
    // Nothing tells which tables lead to an external data file.
    if (metadata.rules().external_data) return false;
    const std::uint64_t file_bytes = TRY(walked_length(metadata));
    WalkOptions walk_options;
    walk_options.refcounts = false;
    walk_options.workers = options.workers;
    walk_options.control.stop = options.control.stop;
    if (options.zeroes) walk_options.control.progress = options.control.progress;
    ClusterVisitor clusters(metadata, data, options.zeroes);
    TRY(walk(metadata, file_bytes, walk_options, clusters));
    walk_options.control.progress = {};
    TableVisitor tables(metadata, clusters, options.zeroes);
    TRY(walk(metadata, file_bytes, walk_options, tables));
    if (clusters.changed() || tables.changed()) TRY_VOID(metadata.file().flush());
    return clusters.changed() || tables.changed();
}

}  // namespace qcow::qcow2
