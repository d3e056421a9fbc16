#include "qcow2/writer.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "base/try.h"
#include "qcow2/check.h"

namespace qcow::qcow2 {
namespace {

using format::ClusterKind;
using format::L2Entry;

constexpr std::uint64_t max_batch_bytes = 16 * MiB;  // that one change of entries is about
constexpr std::uint64_t max_retired_bytes = 256 * MiB;
constexpr std::size_t page_entries = 512;
constexpr std::size_t max_verify_bytes = 256 * MiB;
constexpr std::uint64_t small_file_bytes = 256 * MiB;  // not worth more than one thread to check
constexpr unsigned flushes_at_once = 4;                // file systems make one commit of them

}  // namespace

Writer::Writer(std::shared_ptr<Core> core, View& active, const WriteOptions& options)
    : core_(std::move(core)),
      active_(active),
      options_(options),
      cluster_bits_(core_->header.cluster_bits),
      rules_(core_->rules),
      metadata_(cluster_bits_),
      write_back_(*core_, options.cache != CacheMode::unsafe),
      size_(core_->header.size),
      raw_data_(rules_.external_data && (core_->header.autoclear & format::autoclear::raw_external_data) != 0),
      allocator_(*core_, write_back_, metadata_, epochs_, options.discard),
      bitmaps_(*core_, write_back_, metadata_, allocator_),
      group_(flushes_at_once) {
    active_.on_damage([this](Error damage) { return write_back_.declare_corrupt(std::move(damage)); });
}

Writer::~Writer() { active_.on_damage({}); }

Result<void> Writer::open() {
    TRY_VOID(active_.verify_readable());
    const auto& header = core_->header;
    if (header.has(format::incompatible::corrupt)) {
        return fail(Errc::corrupt, "header field incompatible_features (byte 72)",
                    "the image is marked as corrupt, so it is not written; check it, or open it for reading only");
    }
    const auto file_size = TRY(core_->file->size());
    TRY_VOID(format::verify_refcount_table(header, cluster_bits_, file_size));
    if (core_->l1_left_out) TRY_VOID(core_->file->resize(header.l1_table.value + std::uint64_t{header.l1_entries} * 8));
    TRY_VOID(metadata_.load(*core_));
    TRY_VOID(bitmaps_.load());
    TRY_VOID(allocator_.load());
    return header.has(format::incompatible::dirty) ? rebuild_refcounts() : verify_refcounts();
}

/// Refcounts that are too low would have clusters handed out that something refers to.
Result<void> Writer::verify_refcounts() {
    if (!options_.verify_refcounts) return {};
    CheckOptions check;
    check.memory_bytes = max_verify_bytes;
    check.workers = TRY(core_->file->size()) < small_file_bytes ? 1 : 0;
    auto verified = verify_counted(*core_, check);
    if (verified || verified.error().code == Errc::limit_exceeded) return {};
    if (verified.error().code != Errc::corrupt) return verified;
    auto error = std::move(verified).error();
    error.what += ", so that a write could destroy data";
    return write_back_.declare_corrupt(std::move(error),
                                       "it can still be read, so copy its contents with qcow convert, or have its "
                                       "refcounts counted anew with qemu-img check -r all");
}

/// Of an image whose last writer kept them in memory, and did not close it.
Result<void> Writer::rebuild_refcounts() {
    TRY_VOID(begin_first());
    TRY_VOID(allocator_.rebuild());
    CheckOptions options;
    options.max_findings = 1;
    const auto report = TRY(check_image(*core_, options));
    if (report.corruptions != 0 || report.errors != 0) {
        return fail(Errc::corrupt, report.findings.front().place,
                    report.findings.front().what + "; this is left after the refcounts of a dirty image were rebuilt");
    }
    TRY_VOID(write_back_.update_header(
        [](format::HeaderState& changed) { changed.incompatible &= ~format::incompatible::dirty; }));
    return write_back_.sync();
}

/// Comes before every change, of these guest bytes.
Result<void> Writer::begin_writing(GuestOffset at, std::uint64_t length) {
    TRY_VOID(write_back_.verify_writable());
    if (!begun_.load(std::memory_order_acquire)) TRY_VOID(begin_first());
    return bitmaps_.record(at, length);
}

/// What has to be on disk before the first change is.
Result<void> Writer::begin_first() {
    const std::lock_guard lock(begin_mutex_);
    if (begun_) return {};
    const auto header = core_->current_header();
    // What is not known may depend on what is about to change.
    std::uint64_t kept = format::autoclear::raw_external_data;
    if (core_->header.bitmaps_consistent(header)) kept |= format::autoclear::bitmaps;
    if ((header.autoclear & ~kept) != 0) {
        TRY_VOID(write_back_.update_header([&](format::HeaderState& changed) { changed.autoclear &= kept; }));
        TRY_VOID(write_back_.sync());
    }
    TRY_VOID(bitmaps_.mark_in_use());
    begun_.store(true, std::memory_order_release);
    return {};
}

Result<void> Writer::verify_no_metadata(const Storage& file, HostOffset at, std::uint64_t length) {
    if (&file != core_->file.get()) return {};
    const auto used = metadata_.find(at, length);
    if (used.empty()) return {};
    return write_back_.declare_corrupt(fmt::format("host offset {:#x}", at.value),
                                       fmt::format("guest data would be written over {}", used));
}

std::uint64_t Writer::l2_end(GuestOffset at) const {
    const auto& geometry = rules_.geometry;
    return ((at.value >> cluster_bits_) / geometry.l2_entries() + 1) * geometry.l2_entries();
}

/// The end of the clusters whose entries the cache changes all at once.
std::uint64_t Writer::page_end(GuestOffset at) const {
    const std::uint64_t entries = core_->words.page_bytes() / (rules_.geometry.entry_words() * 8);
    return ((at.value >> cluster_bits_) / entries + 1) * entries;
}

// --- writing ---------------------------------------------------------------------------------------------------------

Result<void> Writer::write(GuestOffset at, std::span<const std::byte> from) {
    return write_back_.attempt([&]() -> Result<void> {
        TRY_VOID(begin_writing(at, from.size()));
        TRY_VOID(write_mapped(at, from));
        return finish_request();
    });
}

Result<void> Writer::write_mapped(GuestOffset at, std::span<const std::byte> from) {
    const Epochs::Guard guard(epochs_);
    while (!from.empty()) {
        const auto mapped = TRY(active_.lookup(at, from.size()));
        const bool in_place = mapped.kind == ClusterKind::data && mapped.copied;
        const std::size_t done = TRY(in_place ? write_in_place(mapped, from) : write_and_map(at, from));
        at += done;
        from = from.subspan(done);
    }
    return {};
}

/// When nothing is held any more. What is retired is free only after a flush, and somebody may never flush.
Result<void> Writer::flush_if_full() {
    return allocator_.retired_bytes() >= max_retired_bytes ? flush() : Result<void>();
}

/// After each change, when nothing is held any more.
Result<void> Writer::finish_request() { return options_.cache == CacheMode::writethrough ? flush() : flush_if_full(); }

Result<std::size_t> Writer::write_in_place(const Mapped& mapped, std::span<const std::byte> from) {
    TRY_VOID(verify_no_metadata(*core_->data, mapped.host, mapped.length));
    TRY_VOID(core_->data->write(mapped.host, from.first(mapped.length)));
    return mapped.length;
}

bool Writer::needs_new_cluster(L2Entry entry) const {
    return entry.compressed() || !entry.copied() || !rules_.has_cluster(entry);
}

/// Writes what needs a change of entries, from the front, as much as can be done at once.
Result<std::size_t> Writer::write_and_map(GuestOffset at, std::span<const std::byte> from) {
    const std::uint64_t first = at.value >> cluster_bits_;
    const std::uint64_t most = std::max<std::uint64_t>(max_batch_bytes >> cluster_bits_, 1);
    const std::uint64_t end = std::min({page_end(at), first + most, rules_.geometry.clusters(at.value + from.size())});
    const RangeLocks::Guard guard(clusters_, first, end);

    const auto mapped = TRY(active_.lookup(at, from.size()));
    if (mapped.kind == ClusterKind::data && mapped.copied) return write_in_place(mapped, from);  // meanwhile
    const auto old = TRY(load_entries({first, end}));
    if (!needs_new_cluster(old.front())) return write_into_own(at, from.first(mapped.length), old.front());
    const auto last = std::ranges::find_if(old, [&](L2Entry entry) { return !needs_new_cluster(entry); });
    const auto count = static_cast<std::size_t>(last - old.begin());
    const std::uint64_t bytes = cluster_at(first + count).value - at.value;
    return write_into_new(at, from.first(std::min<std::uint64_t>(bytes, from.size())), std::span(old).first(count));
}

/// Writes to clusters that are given new places. `old`: their entries.
Result<std::size_t> Writer::write_into_new(GuestOffset at, std::span<const std::byte> from,
                                           std::span<const L2Entry> old) {
    const std::uint64_t first = at.value >> cluster_bits_;
    ClusterRun run{first, old.size()};  // the data of an external file lie where the guest sees them
    if (!rules_.external_data) run = TRY(allocator_.take(first, old.size()));
    old = old.first(run.count);
    from = from.first(std::min<std::uint64_t>(from.size(), cluster_at(first + run.count).value - at.value));
    const GuestOffset write_end = at + from.size();

    // Subclusters (or clusters) that are written to, and those of the old place that have to move with them.
    const std::uint64_t unit = bit(rules_.geometry.subcluster_bits());
    GuestOffset begin{align_down(at.value, unit)};
    GuestOffset end{align_down(write_end.value + unit - 1, unit)};
    const auto moves_whole = [&](L2Entry entry) {
        return !rules_.geometry.extended_l2 || entry.compressed() || rules_.has_cluster(entry);
    };
    if (moves_whole(old.front())) begin = cluster_at(first);
    if (moves_whole(old.back())) end = cluster_at(first + old.size());
    if (rules_.external_data) end = std::max(write_end, std::min(end, GuestOffset{size_.load()}));  // and no longer

    const HostOffset host = HostOffset{run.first << cluster_bits_} + rules_.geometry.offset_in_cluster(begin.value);
    auto written = [&]() -> Result<void> {
        const bool zeros_before = TRY(reads_as_zeros(begin, end - begin));
        TRY_VOID(write_filled(host, begin, end, at, from, zeros_before && !rules_.external_data));
        std::vector<L2Entry> entries(old.size());
        for (std::size_t i = 0; i < old.size(); ++i) {
            const GuestOffset cluster = cluster_at(first + i);
            auto& entry = entries[i];
            entry.word = (run.first + i) << cluster_bits_ | format::copied_bit;
            if (!rules_.geometry.extended_l2) continue;
            const auto at_sub = (std::max(at, cluster) - cluster) / unit;
            const auto end_sub = divide_up(std::min(write_end, cluster + bit(cluster_bits_)) - cluster, unit);
            // Of what moved, zeros stay zeros and holes stay holes.
            const std::uint64_t touched = format::subcluster_mask(at_sub, end_sub);
            const std::uint64_t moved = (old[i].compressed() ? ~std::uint64_t{0} : old[i].bitmap) & low_bits(32);
            const std::uint64_t zeros = old[i].compressed() ? 0 : old[i].bitmap & ~low_bits(32) & ~(touched << 32);
            entry.bitmap = touched | moved | zeros;
        }
        return store_entries(first, entries, !zeros_before || rules_.external_data);
    }();
    if (!written) {
        if (!rules_.external_data) allocator_.retire(run);
        return std::unexpected(std::move(written).error());
    }
    retire(old);
    return from.size();
}

/// Writes to a cluster that has a place of its own, where the guest sees nothing of it yet.
Result<std::size_t> Writer::write_into_own(GuestOffset at, std::span<const std::byte> from, L2Entry old) {
    const std::uint64_t cluster = at.value >> cluster_bits_;
    from = from.first(std::min<std::uint64_t>(from.size(), cluster_at(cluster + 1).value - at.value));
    const std::uint64_t unit = bit(rules_.geometry.subcluster_bits());
    const GuestOffset begin{align_down(at.value, unit)};
    GuestOffset end{align_down(at.value + from.size() + unit - 1, unit)};
    if (rules_.external_data) end = std::max(at + from.size(), std::min(end, GuestOffset{size_.load()}));
    const HostOffset host = old.cluster() + rules_.geometry.offset_in_cluster(begin.value);
    TRY_VOID(verify_no_metadata(*core_->data, host, end - begin));
    TRY_VOID(write_filled(host, begin, end, at, from, false));
    L2Entry entry = old;
    if (rules_.geometry.extended_l2) {
        const GuestOffset start = cluster_at(cluster);
        const std::uint64_t touched = format::subcluster_mask((begin - start) / unit, divide_up(end - start, unit));
        entry.bitmap = (old.bitmap | touched) & ~(touched << 32);
    } else {
        entry.word &= ~format::zero_bit;
    }
    // What the place held before must not show.
    TRY_VOID(store_entries(cluster, {&entry, 1}, true));
    return from.size();
}

/// Writes guest bytes [begin, end) to `host`: `from` at `at`, around it what the guest sees there now. `zeros_there`:
/// that is zeros, and the place is zeros already.
Result<void> Writer::write_filled(HostOffset host, GuestOffset begin, GuestOffset end, GuestOffset at,
                                  std::span<const std::byte> from, bool zeros_there) {
    if (zeros_there || (begin == at && end == at + from.size())) return core_->data->write(host + (at - begin), from);
    // The first and the last cluster are completed in memory, so that each is written once; what lies between them is
    // written from where it is.
    const GuestOffset from_end = at + from.size();
    std::vector<std::byte> buffer;
    const auto write_part = [&](GuestOffset part, GuestOffset part_end) -> Result<void> {
        buffer.resize(part_end - part);
        const GuestOffset inner = std::max(at, part);
        const GuestOffset inner_end = std::min(from_end, part_end);
        if (inner > part) TRY_VOID(read_old(part, std::span(buffer).first(inner - part)));
        if (inner_end < part_end) TRY_VOID(read_old(inner_end, std::span(buffer).subspan(inner_end - part)));
        std::memcpy(buffer.data() + (inner - part), from.data() + (inner - at), inner_end - inner);
        return core_->data->write(host + (part - begin), buffer);
    };
    const std::uint64_t cluster_size = bit(cluster_bits_);
    const GuestOffset head_end =
        at == begin ? begin : std::min(end, GuestOffset{align_down(at.value, cluster_size) + cluster_size});
    const GuestOffset tail =
        from_end == end ? end : std::max(head_end, GuestOffset{align_down(from_end.value - 1, cluster_size)});
    if (head_end > begin) TRY_VOID(write_part(begin, head_end));
    if (tail > head_end)
        TRY_VOID(core_->data->write(host + (head_end - begin), from.subspan(head_end - at, tail - head_end)));
    return end > tail ? write_part(tail, end) : Result<void>();
}

/// What the guest sees now; zeros past the end of the disk.
Result<void> Writer::read_old(GuestOffset at, std::span<std::byte> to) {
    const std::uint64_t size = size_.load();
    const std::size_t there = at.value >= size ? 0 : std::min<std::uint64_t>(to.size(), size - at.value);
    if (there != 0) TRY_VOID(active_.read(at, to.first(there)));
    std::memset(to.data() + there, 0, to.size() - there);
    return {};
}

/// Whether that is known without looking at data.
Result<bool> Writer::reads_as_zeros(GuestOffset at, std::uint64_t length) {
    const std::uint64_t size = size_.load();
    const GuestOffset end{std::min(at.value + length, size)};
    while (at < end) {
        const auto extent = TRY(active_.extent(at, end - at));
        if (extent.kind == Extent::Kind::data) return false;
        at += extent.length;
    }
    return true;
}

// --- entries ---------------------------------------------------------------------------------------------------------

Result<format::L1Entry> Writer::l1_entry(GuestOffset at) {
    auto entry = active_.mapping().l1_entry(at);
    if (!entry && entry.error().code == Errc::corrupt) return write_back_.declare_corrupt(std::move(entry).error());
    return entry;
}

Result<std::vector<L2Entry>> Writer::load_entries(Clusters clusters) {
    std::vector<L2Entry> entries(clusters.end - clusters.first);
    const GuestOffset at = cluster_at(clusters.first);
    const auto l1 = TRY(l1_entry(at));
    if (!l1.allocated()) return entries;
    const unsigned entry_words = rules_.geometry.entry_words();
    HostOffset host = l1.l2_table() + rules_.geometry.l2_index(at) * entry_words * 8;
    std::array<std::uint64_t, page_entries> words;
    for (std::size_t i = 0; i < entries.size();) {
        const auto loaded = TRY(core_->words.load(
            host, std::span(words).first(std::min<std::uint64_t>(words.size(), (entries.size() - i) * entry_words))));
        for (std::size_t k = 0; k < loaded; k += entry_words) {
            entries[i++] = {words[k], entry_words == 2 ? words[k + 1] : 0};
        }
        host += loaded * 8;
    }
    for (std::size_t i = 0; i < entries.size(); ++i) {
        if (const auto flaw = rules_.flaw(entries[i]); flaw && flaw->unreadable) {
            return write_back_.declare_corrupt(
                fmt::format("L2 entry of guest offset {:#x}", cluster_at(clusters.first + i).value),
                std::string(flaw->what));
        }
    }
    return entries;
}

/// Makes these the entries of the clusters from `first` on, up to page_end() at most: all of them, or none if it fails.
Result<void> Writer::store_entries(std::uint64_t first, std::span<const L2Entry> entries, bool barrier) {
    const GuestOffset at = cluster_at(first);
    const std::lock_guard lock(l2_locks_[rules_.geometry.l1_index(at) % l2_locks_.size()]);
    const HostOffset table = TRY(l2_table_for(at));
    const unsigned entry_words = rules_.geometry.entry_words();
    std::array<std::uint64_t, page_entries> words;
    for (std::size_t i = 0; i < entries.size(); ++i) {
        words[i * entry_words] = entries[i].word;
        if (entry_words == 2) words[i * 2 + 1] = entries[i].bitmap;
    }
    return write_back_.store(table + rules_.geometry.l2_index(at) * entry_words * 8,
                             std::span(words).first(entries.size() * entry_words), WordCache::PageClass::mapping,
                             barrier);
}

/// The L2 table that maps `at`, ours alone: made, or copied from one that a snapshot shares, if need be. Under its
/// lock.
Result<HostOffset> Writer::l2_table_for(GuestOffset at) {
    const auto l1 = TRY(l1_entry(at));
    if (l1.allocated() && l1.copied()) return l1.l2_table();
    const HostOffset table = TRY(allocator_.take_table());
    const std::uint64_t bytes = bit(cluster_bits_);
    core_->words.forget(table, bytes);
    auto made = [&]() -> Result<void> {
        if (l1.allocated()) {
            std::vector<std::byte> copy(bytes);
            std::array<std::uint64_t, page_entries> words;
            for (std::uint64_t i = 0; i < bytes;) {
                const auto loaded = TRY(core_->words.load(l1.l2_table() + i, words));
                for (std::size_t k = 0; k < loaded; ++k, i += 8) store_be(copy, i, words[k]);
            }
            TRY_VOID(core_->file->write(table, copy));
        }
        TRY_VOID(metadata_.add(table, bytes, MetadataMap::Kind::l2_table));
        const std::uint64_t word = table.value | format::copied_bit;
        auto stored = write_back_.store(active_.mapping().l1_entry_at(at), {&word, 1}, WordCache::PageClass::mapping,
                                        l1.allocated());
        if (!stored) metadata_.remove(table, bytes);
        return stored;
    }();
    if (!made) {
        allocator_.retire({table.value >> cluster_bits_, 1});
        return std::unexpected(std::move(made).error());
    }
    if (l1.allocated()) allocator_.retire_table(l1.l2_table(), bytes);
    return table;
}

/// The places of entries that were replaced.
void Writer::retire(std::span<const L2Entry> entries) {
    ClusterRun run;
    const auto finish = [&] {
        if (run.count != 0) allocator_.retire(run);
        run = {};
    };
    for (const auto& entry : entries) {
        if (entry.compressed()) {
            allocator_.retire_stream(entry.compressed_range(cluster_bits_));
            continue;
        }
        if (rules_.external_data || !rules_.has_cluster(entry)) continue;
        const std::uint64_t cluster = entry.cluster().value >> cluster_bits_;
        if (run.count != 0 && run.end() != cluster) finish();
        if (run.count++ == 0) run.first = cluster;
    }
    finish();
}

// --- flushing --------------------------------------------------------------------------------------------------------

Result<void> Writer::flush() {
    return group_.run([&] {
        return write_back_.attempt([&]() -> Result<void> {
            auto retired = allocator_.begin_flush();
            auto flushed = write_back_.write_all();
            if (flushed) flushed = write_back_.sync();
            if (flushed) return allocator_.end_flush(std::move(retired));
            allocator_.flush_failed(std::move(retired));
            return flushed;
        });
    });
}

Result<void> Writer::settle() {
    return write_back_.attempt([&]() -> Result<void> {
        auto saved = bitmaps_.save();
        TRY_VOID(flush());
        begun_ = false;
        if (saved) saved = bitmaps_.clear_in_use();
        TRY_VOID(allocator_.give_back());
        return saved;
    });
}

}  // namespace qcow::qcow2
