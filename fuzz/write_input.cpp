// Images that mean harm, or are sound, and are written to.

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/bits.h"
#include "base/endian.h"
#include "format/header.h"
#include "fuzz/guest_model.h"
#include "fuzz/inputs.h"
#include "fuzz/metadata_walk.h"
#include "fuzz/require.h"
#include "fuzz/writable_storage.h"
#include "fuzz/write_program.h"
#include "qcow/bitmaps.h"
#include "qcow/image.h"
#include "qcow2/amend.h"
#include "qcow2/compaction.h"
#include "qcow2/repair.h"

namespace qcow::fuzz {
namespace {

using Kind = Contents::Kind;
using Verb = Operation::Verb;

// What one input may cost: it is to take milliseconds, whatever it claims.
constexpr std::uint64_t max_written_bytes = 128 * KiB;  // at a time; whole clusters where that is to be
constexpr std::uint64_t max_written_in_all = 4 * MiB;
constexpr std::uint64_t max_zeroed_clusters = 4096;  // at a time
constexpr std::uint64_t max_l1_change = 64 * KiB;    // entries that come or go with a resize
constexpr std::uint64_t max_inspected = 16 * KiB;    // bytes of a run, at each of its ends
constexpr unsigned max_power_losses = 4;
constexpr std::size_t max_snapshots = 4;
constexpr std::size_t max_runs = 24;  // that are inspected in the end
constexpr std::uint64_t max_compacted_clusters = 1 << 16;
constexpr std::size_t job_memory = 16 * MiB;

/// The image and the files that it names, which are handed out one after the other, whatever they are called.
class Shelf {
public:
    explicit Shelf(const std::vector<SparseFile>& files) {
        for (const auto& file : files)
            storages_.push_back(std::make_shared<WritableStorage>(file, "dir/file" + std::to_string(storages_.size())));
    }

    [[nodiscard]] Shelf copy() const {
        Shelf result({});
        for (const auto& storage : storages_) result.storages_.push_back(storage->copy());
        return result;
    }

    [[nodiscard]] WritableStorage& image() const { return *storages_.front(); }
    [[nodiscard]] const std::shared_ptr<WritableStorage>& file() const { return storages_.front(); }

    [[nodiscard]] bool refused() const {
        return std::ranges::any_of(storages_, [](const auto& storage) { return storage->refused(); });
    }

    Result<std::shared_ptr<Image>> open(const std::optional<WriteOptions>& write) const {
        OpenOptions options;
        options.writable = write.has_value();
        if (write) options.write = *write;
        options.format = Format::qcow2;
        options.cache_bytes = 64 * KiB;
        options.gate =
            [this, next = std::size_t{1}](const FileReference& reference) mutable -> Result<std::shared_ptr<Storage>> {
            if (next >= storages_.size()) return no_files()(reference);
            const auto& storage = storages_[next++];
            if (reference.role == FileReference::Role::backing_file) {
                QCOW_REQUIRE(!reference.writable);
                // Nothing is ever written to it.
                storage->watch({[](HostOffset, std::span<const std::byte>) { QCOW_REQUIRE(false); },
                                [](HostOffset, std::uint64_t) { QCOW_REQUIRE(false); }});
            }
            return storage;
        };
        return open_image(storages_.front(), options);
    }

private:
    std::vector<std::shared_ptr<WritableStorage>> storages_;
};

/// Holds every write to an image against what the file's own metadata say, at that moment, of the place.
class Guard {
public:
    Guard(WritableStorage& file, const Guest& guest) : file_(file), guest_(guest), metadata_(metadata_of(file)) {
        snapshots_ = metadata_.snapshots;
        file_.watch({[this](HostOffset at, std::span<const std::byte> from) { written(at.value, from); },
                     [this](HostOffset at, std::uint64_t length) { lost(at.value, length); }});
    }
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;
    ~Guard() { file_.watch({}); }

    /// Learns what has become metadata. Snapshots change only in `changing_snapshots`.
    void refresh() {
        metadata_ = metadata_of(file_);
        QCOW_REQUIRE(snapshots_change_ || metadata_.snapshots == snapshots_);
    }

    /// For the time of `change`, snapshots and their tables may change.
    template <class Change>
    void changing_snapshots(const Change& change) {
        snapshots_change_ = true;
        change();
        refresh();
        snapshots_change_ = false;
        snapshots_ = metadata_.snapshots;
    }

private:
    void written(std::uint64_t at, std::span<const std::byte> from) {
        const std::uint64_t skipped = (8 - at % 8) % 8;
        for (std::uint64_t i = skipped; i + 8 <= from.size(); i += 8) {
            if (guest_.wrote(load_be<std::uint64_t>(from, i))) require_none(at + i, 8, "guest data in ");
        }
    }

    void lost(std::uint64_t at, std::uint64_t length) { require_none(at, length, "made zeros or cut off: "); }

    void require_none(std::uint64_t at, std::uint64_t length, const char* what) {
        if (length == 0 || !touches(at, length)) return;
        // What was metadata may have become free since.
        refresh();
        if (!touches(at, length)) return;
        const auto found = metadata_.clusters.lower_bound(at >> metadata_.cluster_bits);
        std::fprintf(stderr, "host offset %#llx: %s%s\n", static_cast<unsigned long long>(at), what,
                     std::string(found->second).c_str());
        QCOW_REQUIRE(false);
    }

    [[nodiscard]] bool touches(std::uint64_t at, std::uint64_t length) const {
        const auto found = metadata_.clusters.lower_bound(at >> metadata_.cluster_bits);
        return found != metadata_.clusters.end() && found->first <= (at + length - 1) >> metadata_.cluster_bits;
    }

    WritableStorage& file_;
    const Guest& guest_;
    Metadata metadata_;
    std::vector<std::byte> snapshots_;
    bool snapshots_change_ = false;
};

CheckReport check(Image& image) {
    CheckOptions options;
    options.workers = 1;
    options.max_findings = 4;
    options.memory_bytes = 16 * MiB;
    auto report = image.check(options);
    if (succeeded(report)) return *std::move(report);
    CheckReport failed;
    failed.errors = 1;
    return failed;
}

void show(const CheckReport& report) {
    for (const auto& finding : report.findings)
        std::fprintf(stderr, "%s: %s\n", finding.place.c_str(), finding.what.c_str());
}

class Session {
public:
    Session(std::span<const std::byte> input, WriteProgram program, const std::vector<SparseFile>& files)
        : guest_(input), program_(std::move(program)), files_(files), original_files_(files_.copy()) {}

    void run() {
        auto original = original_files_.open(std::nullopt);
        if (succeeded(original)) {
            original_ = *std::move(original);
            const auto report = check(*original_);
            sound_ = report.clean() && report.counted_past_end == 0 && is_readable(*original_);
        }
        guard_.emplace(files_.image(), guest_);
        if (!open()) return;
        for (const auto& operation : program_.operations) {
            perform(operation);
            guard_->refresh();
            if (image_ == nullptr) return;
        }
        close();
    }

private:
    [[nodiscard]] bool trusted() const { return sound_ && !files_.refused(); }

    /// Nothing can be read through an encrypted layer, not even zeros.
    static bool is_readable(const Image& image) {
        const auto info = image.info();
        const auto below = image.backing();
        return info && !info->encryption && (below == nullptr || is_readable(*below));
    }

    bool open() {
        auto opened = files_.open(program_.write_options());
        if (!succeeded(opened)) {
            // What was sound stays so.
            QCOW_REQUIRE(reopened_ == 0 || !trusted());
            return false;
        }
        image_ = *std::move(opened);
        smallest_size_ = std::min(smallest_size_, image_->size());
        ++reopened_;
        return true;
    }

    /// Afterwards a sound image is one again, with nothing lost or left over.
    void close() {
        const bool closed = succeeded(image_->close());
        QCOW_REQUIRE(closed || !trusted());
        guard_->refresh();
        if (sound_) inspect_all(*image_);
        image_.reset();
        if (!sound_) return;
        const auto again = files_.open(std::nullopt);
        QCOW_REQUIRE(succeeded(again));
        const auto report = check(**again);
        if (files_.refused()) return require(report, report.corruptions == 0);
        require(report, report.clean());
        inspect_all(**again);
        inspect_snapshots(**again);
        inspect_bitmaps(**again);
    }

    static void require(const CheckReport& report, bool condition) {
        if (!condition) show(report);
        QCOW_REQUIRE(condition);
    }

    // --- what the guest does

    void perform(const Operation& operation) {
        ++number_;
        const std::uint64_t size = image_->size();
        const bool wild = (operation.units & 0x80) != 0;
        std::uint64_t at = operation.place_on(*image_);
        std::uint64_t length = operation.length_on(*image_);
        if (!wild) {
            if (size == 0 || at >= size) at = size == 0 ? 0 : at % size;
            length = std::min(length, size - at);
        }
        switch (operation.verb) {
            case Verb::write: return write(at, length, {Kind::words, number_});
            case Verb::write_scrambled: return write(at, length, {Kind::scrambled, number_});
            case Verb::write_zero_bytes: return write(at, length, {Kind::zeros, number_});
            case Verb::write_compressed: return write(at, length, {Kind::words, number_}, true);
            case Verb::zero: return zero(at, length, Disk::Zeroes::release);
            case Verb::zero_keeping: return zero(at, length, Disk::Zeroes::keep);
            case Verb::discard: return discard(at, length);
            case Verb::read: return read(at, length);
            case Verb::flush: return flush();
            case Verb::resize: return resize(wild ? at : operation.place_on(*image_), operation.length % 4 != 0);
            case Verb::check: {
                const auto report = check(*image_);
                return require(report, report.clean() || !trusted());
            }
            case Verb::reopen:
                close();
                if (!files_.refused()) open();
                return;
            case Verb::snapshot: return guard_->changing_snapshots([&] { change_snapshots(operation); });
            case Verb::bitmap: return change_bitmaps(operation);
            case Verb::empty: return make_empty();
            case Verb::repair:
            case Verb::compact:
            case Verb::amend: return change_closed_file(operation);
        }
    }

    void write(std::uint64_t at, std::uint64_t length, Contents contents, bool compressed = false) {
        const std::uint64_t most = compressed ? std::max(max_written_bytes, image_->block_size()) : max_written_bytes;
        length = std::min({length, most, max_written_in_all - written_});
        written_ += length;
        std::vector<std::byte> bytes(length);
        guest_.fill(at, bytes, contents);
        const auto result = compressed ? image_->write_compressed({at}, bytes) : image_->write({at}, bytes);
        settle(result, at, length, contents);
    }

    void zero(std::uint64_t at, std::uint64_t length, Disk::Zeroes zeroes) {
        length = std::min(length, max_zeroed_clusters * image_->block_size());
        settle(image_->write_zeroes({at}, length, zeroes), at, length, {Kind::zeros});
    }

    /// Whole blocks become zeros or stay, the rest stays.
    void discard(std::uint64_t at, std::uint64_t length) {
        const std::uint64_t block = image_->block_size();
        length = std::min(length, max_zeroed_clusters * block);
        const bool within = lies_within(at, length, image_->size());
        const bool known = sound_ && within && length <= std::max(max_written_bytes, block);
        const std::uint64_t end = at + length;
        const std::uint64_t first = divide_up(at, block) * block;
        const std::uint64_t last = end == image_->size() ? end : align_down(end, block);
        std::vector<std::optional<std::vector<std::byte>>> before;
        for (std::uint64_t i = first; known && i < last; i += block)
            before.push_back(bytes_at(i, std::min(block, last - i)));
        const auto result = image_->discard({at}, length);
        if (!succeeded(result) || !known) {
            require_legitimate(result, at, length);
            if (within && first < last) model_.assign(first, last, {Kind::unknown});
            return;
        }
        for (std::uint64_t i = first; i < last; i += block) {
            const auto now = bytes_at(i, std::min(block, last - i));
            const auto& then = before[(i - first) / block];
            if (now == then) continue;
            QCOW_REQUIRE(now && is_zero(*now));
            model_.assign(i, std::min(i + block, last), {Kind::zeros});
        }
        inspect(*image_, at, end);
    }

    void read(std::uint64_t at, std::uint64_t length) {
        length = std::min(length, max_written_bytes);
        std::vector<std::byte> bytes(length);
        const bool done = succeeded(image_->read({at}, bytes));
        QCOW_REQUIRE(!done || lies_within(at, length, image_->size()));
        if (sound_ && lies_within(at, length, image_->size())) inspect(*image_, at, at + length);
    }

    /// What follows is what a power loss might leave.
    void flush() {
        const bool flushed = succeeded(image_->flush());
        QCOW_REQUIRE(flushed || !trusted());
        if (!flushed || !trusted() || ++power_losses_ > max_power_losses) return;
        const auto left = files_.copy();
        const auto again = left.open(std::nullopt);
        QCOW_REQUIRE(succeeded(again));
        const auto report = check(**again);
        require(report, report.corruptions == 0 && report.errors == 0);
        inspect_all(**again);
        inspect_snapshots(**again);
    }

    void resize(std::uint64_t wanted, bool shrink) {
        const std::uint64_t size = rounded_size(wanted);
        const std::uint64_t old = image_->size();
        const std::uint64_t block = image_->block_size();
        const std::uint64_t coverage = block * block / 16;
        const std::uint64_t change = std::max(old, size) - std::min(old, size);
        if (change / coverage > max_l1_change) return;
        const auto info = image_->info();
        const bool records = image_->backing() != nullptr || (info && info->data_file_raw);
        if (size > old && records && change / block > max_zeroed_clusters) return;
        if (shrink) smallest_size_ = std::min(smallest_size_, size);
        const auto result = image_->resize(size, shrink ? Image::Shrink::allow : Image::Shrink::refuse);
        if (!succeeded(result)) {
            QCOW_REQUIRE(image_->size() == old || (shrink && image_->size() == size));
            if (shrink || size > old) model_.assign(std::min(old, size), ~std::uint64_t{0}, {Kind::unknown});
            require_legitimate(result, old - std::min(old, block), block);
            return;
        }
        QCOW_REQUIRE(image_->size() == size && (shrink || size >= old));
        model_.assign(std::min(old, size), ~std::uint64_t{0}, {Kind::zeros});
        if (sound_) inspect(*image_, std::min({old, size, size - std::min(size, block)}), size);
    }

    /// A snapshot that the guest had made.
    struct Snapshot {
        std::string id;
        GuestModel model;
        std::uint64_t size = 0;
    };

    void change_snapshots(const Operation& operation) {
        auto snapshots = image_->snapshots();
        if (made_.empty() || operation.length % 4 < 2) {
            const auto made = snapshots.create("s");
            if (made) made_.push_back({made->id, model_, image_->size()});
            return require_done(made);
        }
        const auto chosen = made_.begin() + operation.place % made_.size();
        if (operation.length % 4 == 2) {
            const auto applied = snapshots.apply(chosen->id);
            if (applied) {
                model_ = chosen->model;
                QCOW_REQUIRE(image_->size() == chosen->size);
                smallest_size_ = std::min(smallest_size_, image_->size());
            } else {
                model_.assign(0, ~std::uint64_t{0}, {Kind::unknown});
            }
            return require_done(applied);
        }
        const auto removed = snapshots.remove(chosen->id);
        made_.erase(chosen);
        require_done(removed);
    }

    void change_bitmaps(const Operation& operation) {
        BitmapAction action;
        action.kind = static_cast<BitmapAction::Kind>(operation.length % 6);
        action.bitmap = "fuzzed " + std::to_string(operation.place % 3);
        action.source = "fuzzed " + std::to_string(operation.place / 3 % 3);
        action.granularity = bit(9 + (operation.place >> 8) % 23);
        if (action.kind == BitmapAction::Kind::add && image_->size() / action.granularity > bit(24)) return;
        const auto changed = image_->change_bitmaps(std::array{action});
        if (!changed && changed.error().code == Errc::not_found) return;
        require_done(changed);
    }

    void make_empty() {
        const auto emptied = image_->make_empty();
        model_.assign(0, ~std::uint64_t{0}, {Kind::unknown});
        require_done(emptied);
    }

    /// What a sound image refuses only for want of room, or because the format cannot do it.
    template <class T>
    void require_done(const Result<T>& result) const {
        if (result || !trusted()) return;
        const auto code = result.error().code;
        if (code == Errc::invalid_argument || code == Errc::unsupported || code == Errc::limit_exceeded) return;
        std::fprintf(stderr, "%s\n", result.error().message().c_str());
        QCOW_REQUIRE(false);
    }

    void change_closed_file(const Operation& operation) {
        close();
        if (files_.refused()) return;
        guard_->changing_snapshots([&] {
            if (operation.verb == Verb::repair) require_done(repair());
            if (operation.verb == Verb::compact) require_done(compact(operation));
            if (operation.verb == Verb::amend) require_done(amend(operation));
        });
        if (!files_.refused()) open();
    }

    Result<void> repair() {
        RepairOptions options;
        options.workers = 1;
        options.max_findings = 4;
        options.memory_bytes = job_memory;
        const auto repaired = qcow2::repair_image(files_.file(), nullptr, options);
        if (!repaired) return std::unexpected(repaired.error());
        QCOW_REQUIRE(repaired->losses.empty() || !trusted());
        return {};
    }

    Result<void> compact(const Operation& operation) {
        const auto& file = files_.image();
        const auto header = metadata_of(file);
        if (header.cluster_bits == 0 || file.size().value() >> header.cluster_bits > max_compacted_clusters) return {};
        CompactJob job;
        job.zeroes = operation.place % 2 != 0;
        job.compress = operation.place % 3 == 0;
        job.workers = 1;
        job.memory_bytes = job_memory;
        const auto compacted = qcow2::compact_image(files_.file(), nullptr, job, {}, 64 * KiB);
        if (!compacted) return std::unexpected(compacted.error());
        const std::uint64_t cluster = bit(header.cluster_bits);
        QCOW_REQUIRE(compacted->size_after <= divide_up(compacted->size_before, cluster) * cluster);
        QCOW_REQUIRE(compacted->size_after == file.size().value());
        return {};
    }

    Result<void> amend(const Operation& operation) {
        std::array<std::byte, 8> start = {};
        QCOW_REQUIRE(succeeded(files_.image().read({0}, start)));
        // Snapshots get what version 3 requires before this, and version 2 has only one width of refcounts.
        if (load_be<std::uint32_t>(start, 4) < 3 && !metadata_of(files_.image()).snapshots.empty()) return {};
        AmendOptions options;
        options.refcount_bits = 1U << operation.place % 7;
        options.version = 3;
        options.lazy_refcounts = operation.length % 2 != 0;
        const auto fits = qcow2::verify_refcounts_fit(files_.file(), *options.refcount_bits, {});
        return fits ? qcow2::amend_header(files_.file(), options, {}) : fits;
    }

    // --- what must come of it

    void settle(const Result<void>& result, std::uint64_t at, std::uint64_t length, Contents contents) {
        const bool within = lies_within(at, length, image_->size());
        if (succeeded(result)) {
            QCOW_REQUIRE(within);
            model_.assign(at, at + length, contents);
        } else {
            require_legitimate(result, at, length);
            if (within) model_.assign(at, at + length, {Kind::unknown});
        }
        if (!sound_ || !within) return;
        const std::uint64_t block = image_->block_size();
        inspect(*image_, at - std::min(at, block), std::min(image_->size(), at + length + block));
    }

    /// A sound image is not written only where there is no room, where the format cannot do it, or where what would
    /// have to move with the data cannot be read.
    void require_legitimate(const Result<void>& result, std::uint64_t at, std::uint64_t length) {
        if (result || !trusted()) return;
        const auto code = result.error().code;
        if (code == Errc::invalid_argument || code == Errc::unsupported || code == Errc::limit_exceeded) return;
        const std::uint64_t block = original_->block_size();
        const std::uint64_t begin = std::min(align_down(at, block), original_->size());
        const std::uint64_t end = std::min(divide_up(at + length, block) * block, original_->size());
        std::vector<std::byte> bytes(std::min(end - begin, 4 * MiB));
        const bool readable = original_->read({begin}, bytes).has_value();
        if (readable) std::fprintf(stderr, "%s\n", result.error().message().c_str());
        QCOW_REQUIRE(!readable);
    }

    [[nodiscard]] std::optional<std::vector<std::byte>> bytes_at(std::uint64_t at, std::uint64_t length) const {
        std::vector<std::byte> bytes(length);
        if (!succeeded(image_->read({at}, bytes))) return std::nullopt;
        return bytes;
    }

    /// Both ends of [begin, end), which lies within the disk.
    void inspect(Disk& disk, std::uint64_t begin, std::uint64_t end) const {
        inspect_part(disk, begin, std::min(end, begin + max_inspected));
        if (end > begin + max_inspected) inspect_part(disk, std::max(begin + max_inspected, end - max_inspected), end);
    }

    void inspect_part(Disk& disk, std::uint64_t begin, std::uint64_t end) const {
        inspect_part(disk, begin, end, model_);
    }

    void inspect_part(Disk& disk, std::uint64_t begin, std::uint64_t end, const GuestModel& model) const {
        model.each(begin, end, [&](std::uint64_t first, std::uint64_t last, Contents contents) {
            if (contents.kind == Kind::unknown) return;
            std::vector<std::byte> expected(last - first);
            if (contents.kind != Kind::original) {
                guest_.fill(first, expected, contents);
            } else if (!original_->read({first}, expected)) {
                return;
            }
            std::vector<std::byte> found(expected.size());
            const auto read = disk.read({first}, found);
            if (!read)
                std::fprintf(stderr, "guest offset %#llx: %s\n", static_cast<unsigned long long>(first),
                             read.error().message().c_str());
            QCOW_REQUIRE(succeeded(read));
            if (found != expected) {
                const auto differs = std::ranges::mismatch(found, expected).in1 - found.begin();
                std::fprintf(stderr, "guest offset %#llx: not what was written last\n",
                             static_cast<unsigned long long>(first + static_cast<std::uint64_t>(differs)));
            }
            QCOW_REQUIRE(found == expected);
        });
    }

    void inspect_all(Disk& disk) const {
        inspect(disk, 0, disk.size());
        std::size_t runs = 0;
        model_.each(0, disk.size(), [&](std::uint64_t first, std::uint64_t last, Contents contents) {
            if (contents.kind != Kind::original && ++runs <= max_runs) inspect(disk, first, last);
        });
    }

    void inspect_snapshots(Image& image) const {
        const auto info = original_->info();
        QCOW_REQUIRE(succeeded(info));
        for (std::size_t i = 0; i < std::min(info->snapshots.size(), max_snapshots); ++i) {
            const auto then = original_->snapshots().open(info->snapshots[i].id);
            const auto now = image.snapshots().open(info->snapshots[i].id);
            if (!then) continue;
            QCOW_REQUIRE(succeeded(now) && (*now)->size() == (*then)->size());
            std::vector<std::byte> expected(std::min((*then)->size(), 4 * max_inspected));
            std::vector<std::byte> found(expected.size());
            if (!(*then)->read({0}, expected)) continue;
            QCOW_REQUIRE(succeeded((*now)->read({0}, found)) && found == expected);
        }
        for (const auto& snapshot : made_) {
            const auto now = image.snapshots().open(snapshot.id);
            QCOW_REQUIRE(succeeded(now) && (*now)->size() == snapshot.size);
            inspect_part(**now, 0, std::min(snapshot.size, 4 * max_inspected), snapshot.model);
        }
    }

    /// An enabled bitmap that was not in use has every byte that has changed since, and all that it had.
    void inspect_bitmaps(Image& image) const {
        const auto before = original_->info();
        const auto after = image.info();
        QCOW_REQUIRE(succeeded(before) && succeeded(after) && before->bitmaps.size() <= after->bitmaps.size());
        for (std::size_t i = 0; i < before->bitmaps.size(); ++i) {
            const auto& name = before->bitmaps[i].name;
            if (before->bitmaps[i].in_use || after->bitmaps[i].in_use) continue;
            const auto old = dirty_runs(*original_, name);
            const auto now = dirty_runs(image, name);
            if (!old || !now) continue;
            for (const auto& run : *old) {
                const auto end = std::min(run.start.value + run.length, smallest_size_);
                if (run.start.value < end) QCOW_REQUIRE(is_dirty(*now, run.start.value, end));
            }
            if (!before->bitmaps[i].enabled) continue;
            model_.each(0, std::min({image.size(), smallest_size_, max_bitmap_range}),
                        [&](std::uint64_t first, std::uint64_t last, Contents contents) {
                            if (contents.kind != Kind::original && contents.kind != Kind::unknown)
                                QCOW_REQUIRE(is_dirty(*now, first, last));
                        });
        }
    }

    static constexpr std::uint64_t max_bitmap_range = 4 * MiB;

    static std::optional<std::vector<DirtyRun>> dirty_runs(Image& image, const std::string& name) {
        std::vector<DirtyRun> runs;
        const auto visited = image.each_dirty(name, {0}, std::min(image.size(), max_bitmap_range),
                                              [&](const DirtyRun& run) -> Result<void> {
                                                  if (run.dirty) runs.push_back(run);
                                                  return {};
                                              });
        if (!succeeded(visited)) return std::nullopt;
        return runs;
    }

    static bool is_dirty(const std::vector<DirtyRun>& runs, std::uint64_t begin, std::uint64_t end) {
        for (const auto& run : runs) {
            if (run.start.value <= begin) begin = std::max(begin, run.start.value + run.length);
        }
        return begin >= end;
    }

    const Guest guest_;
    const WriteProgram program_;
    const Shelf files_;
    const Shelf original_files_;
    std::shared_ptr<Image> original_;  // as it was, for reading
    std::optional<Guard> guard_;
    std::shared_ptr<Image> image_;
    GuestModel model_;
    std::vector<Snapshot> made_;
    std::uint64_t smallest_size_ = ~std::uint64_t{0};  // that the disk ever had: bitmaps forget what lies behind
    bool sound_ = false;                               // a check found nothing wrong with it at first
    std::uint8_t number_ = 0;
    unsigned reopened_ = 0;
    unsigned power_losses_ = 0;
    std::uint64_t written_ = 0;
};

}  // namespace

void run_write_input(std::span<const std::byte> input) {
    auto rest = input;
    auto program = WriteProgram::take(rest);
    Session(input, std::move(program), parse_files(rest)).run();
}

}  // namespace qcow::fuzz
