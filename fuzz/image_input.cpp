#include <algorithm>
#include <bit>
#include <optional>
#include <string>
#include <vector>

#include "base/bits.h"
#include "base/try.h"
#include "fuzz/inputs.h"
#include "fuzz/metadata_walk.h"
#include "fuzz/require.h"
#include "fuzz/sparse_files.h"
#include "fuzz/writable_storage.h"
#include "qcow/copy.h"
#include "qcow/image.h"
#include "qcow2/repair.h"

namespace qcow::fuzz {
namespace {

constexpr std::size_t max_snapshots = 6;
constexpr std::size_t max_bitmaps = 6;
constexpr std::uint64_t max_bits = 100'000;  // of a bitmap
constexpr std::uint64_t max_whole_read = 64 * KiB;
constexpr std::size_t probe_bytes = 700;  // not aligned to anything

/// What one disk may cost: a run over an input is to take milliseconds, whatever it claims.
struct Budget {
    unsigned extents = 160;
    unsigned errors = 24;
    std::uint64_t bytes = 3 * MiB;  // read, or decompressed for the sake of reading
};

class DiskExerciser {
public:
    explicit DiskExerciser(Disk& disk) : disk_(disk) {}

    /// Whether all extents that were asked for could be told.
    bool run() {
        QCOW_REQUIRE(std::has_single_bit(disk_.block_size()));
        std::byte one = {};
        QCOW_REQUIRE(!succeeded(disk_.read({disk_.size()}, {&one, 1})));
        QCOW_REQUIRE(!succeeded(disk_.read({~std::uint64_t{0}}, {&one, 1})));
        QCOW_REQUIRE(!succeeded(disk_.extent({disk_.size()}, 1)));
        const std::uint64_t size = disk_.size();
        walk(0, budget_.extents / 2);
        walk(size / 2, budget_.extents / 4);
        walk(size - std::min(size, disk_.block_size() + 1), 2);
        if (size <= max_whole_read) read_whole();
        return !failed_;
    }

private:
    void walk(std::uint64_t at, unsigned max_extents) {
        for (unsigned i = 0; i < max_extents && at < disk_.size(); ++i) {
            const std::uint64_t limit = disk_.size() - at;
            const auto extent = disk_.extent({at}, limit);
            if (!succeeded(extent)) {
                failed_ = true;
                if (budget_.errors-- == 0) {
                    budget_.errors = 0;
                    return;
                }
                // Nothing to say about the extents, but reading must fail as gracefully.
                probe({at}, std::min<std::uint64_t>(limit, probe_bytes), nullptr);
                at = align_down(at, disk_.block_size()) + disk_.block_size();
                continue;
            }
            QCOW_REQUIRE(extent->start.value == at && extent->length > 0 && extent->length <= limit);
            QCOW_REQUIRE(extent->host.has_value() == (extent->storage != nullptr));
            QCOW_REQUIRE(!extent->compressed || extent->kind == Extent::Kind::data);
            QCOW_REQUIRE(extent->kind != Extent::Kind::unallocated || !extent->host);
            const auto length = std::min<std::uint64_t>(extent->length, probe_bytes);
            probe({at}, length, &*extent);
            if (extent->length > length) probe({at + extent->length - length}, length, &*extent);
            at += extent->length;
        }
    }

    /// Reads a piece and holds it against what its extent says of it.
    void probe(GuestOffset at, std::uint64_t length, const Extent* extent) {
        const std::uint64_t cost = extent == nullptr || extent->compressed ? 2 * disk_.block_size() : length;
        if (cost > budget_.bytes) return;
        budget_.bytes -= cost;
        std::vector<std::byte> bytes(length, std::byte{0xa5});
        if (!succeeded(disk_.read(at, bytes)) || extent == nullptr) return;
        if (extent->kind != Extent::Kind::data) {
            QCOW_REQUIRE(is_zero(bytes));
        } else if (extent->host) {
            std::vector<std::byte> stored(length);
            QCOW_REQUIRE(succeeded(extent->storage->read(*extent->host + (at - extent->start), stored)));
            QCOW_REQUIRE(stored == bytes);
        }
    }

    /// All at once, in pieces and through the copier: always the same bytes. A disk with a layer out of reach is not
    /// copied.
    void read_whole() {
        if (!succeeded(disk_.read({0}, {}))) return;
        std::vector<std::byte> whole(disk_.size());
        if (!succeeded(disk_.read({0}, whole))) return;
        std::vector<std::byte> pieces(whole.size());
        for (std::size_t at = 0; at < whole.size();) {
            const auto part = std::span(pieces).subspan(at, std::min<std::size_t>(whole.size() - at, 3 * 512 + 77));
            QCOW_REQUIRE(succeeded(disk_.read({at}, part)));
            at += part.size();
        }
        QCOW_REQUIRE(pieces == whole);

        const auto storage = memory_storage(std::vector<std::byte>(whole.size()), "copy");
        const auto target = open_image(storage, {.writable = true, .format = Format::raw});
        QCOW_REQUIRE(succeeded(target));
        CopyOptions options;
        options.workers = 1;
        options.sparse_bytes = 512;
        QCOW_REQUIRE(succeeded(copy_disk(disk_, **target, options)));
        QCOW_REQUIRE(succeeded(storage->read({0}, pieces)));
        QCOW_REQUIRE(pieces == whole);

        const auto usage = measure_usage(disk_);
        if (!succeeded(usage)) return;
        std::uint64_t sum = usage->unallocated_bytes;
        for (const auto& layer : usage->layers) sum += layer.data_bytes + layer.compressed_bytes + layer.zero_bytes;
        QCOW_REQUIRE(sum == disk_.size());
    }

    Disk& disk_;
    Budget budget_;
    bool failed_ = false;
};

void exercise_bitmap(Image& image, const BitmapInfo& bitmap) {
    const std::uint64_t length =
        bitmap.granularity > image.size() / max_bits ? image.size() : bitmap.granularity * max_bits;
    std::uint64_t at = 0;
    const auto visited = image.each_dirty(bitmap.name, {0}, length, [&](const DirtyRun& run) -> Result<void> {
        QCOW_REQUIRE(run.start.value == at && run.length > 0 && run.length <= length - at);
        at += run.length;
        return {};
    });
    QCOW_REQUIRE(!succeeded(visited) || at == length);
}

void exercise(Image& image) {
    const bool mapped = DiskExerciser(image).run();
    if (image.format() == Format::raw) return;

    const auto info = image.info();
    if (succeeded(info)) {
        QCOW_REQUIRE(info->virtual_size == image.size());
        for (std::size_t i = 0; i < std::min(info->snapshots.size(), max_snapshots); ++i) {
            const auto snapshot = image.snapshots().open(info->snapshots[i].id);
            if (succeeded(snapshot)) DiskExerciser(**snapshot).run();
        }
    }
    for (std::size_t i = 0; succeeded(info) && i < std::min(info->bitmaps.size(), max_bitmaps); ++i)
        exercise_bitmap(image, info->bitmaps[i]);
    QCOW_REQUIRE(!succeeded(image.snapshots().open("there is none of this name")));

    CheckOptions options;
    options.workers = 1;
    options.max_findings = 8;
    options.memory_bytes = MiB;
    const auto report = image.check(options);
    if (!succeeded(report)) return;
    QCOW_REQUIRE(report->findings.size() <= options.max_findings);
    QCOW_REQUIRE(report->clean() == report->findings.empty());
    // What a check finds nothing wrong with can be mapped to its end.
    const bool alone = succeeded(info) && !info->backing && !info->data_file;
    QCOW_REQUIRE(!alone || mapped || !report->clean());
}

/// Bytes of a disk or a snapshot that could be read.
struct Sample {
    std::string snapshot;  // its id; empty: of the disk
    GuestOffset at;
    std::vector<std::byte> bytes;
};

/// The first bytes of extents. Data that lie in metadata change with these.
void take_samples(Disk& disk, const std::string& snapshot, const Metadata& metadata, std::vector<Sample>& samples) {
    constexpr std::size_t most = 48;  // of a disk
    constexpr std::size_t bytes = 64;
    const std::uint64_t size = disk.size();
    std::size_t taken = 0;
    for (GuestOffset at; at.value < size && taken < most; ++taken) {
        std::vector<std::byte> data(std::min<std::uint64_t>(bytes, size - at.value));
        const auto extent = disk.extent(at, size - at.value);
        const bool in_metadata = succeeded(extent) && extent->host && metadata.find(extent->host->value) != nullptr;
        if (!in_metadata && succeeded(disk.read(at, data))) samples.push_back({snapshot, at, std::move(data)});
        at = at + (succeeded(extent) ? extent->length : disk.block_size() - at.value % disk.block_size());
    }
}

Result<std::shared_ptr<Image>> open_alone(const std::shared_ptr<WritableStorage>& file) {
    OpenOptions options;
    options.format = Format::qcow2;
    options.follow = false;
    options.cache_bytes = 64 * KiB;
    return open_image(file, options);
}

std::vector<Sample> samples_of(const std::shared_ptr<WritableStorage>& file) {
    std::vector<Sample> samples;
    const auto image = open_alone(file);
    if (!succeeded(image)) return samples;
    const auto metadata = metadata_of(*file);
    take_samples(**image, "", metadata, samples);
    const auto snapshots = (*image)->snapshots().list();
    if (!succeeded(snapshots)) return samples;
    for (std::size_t i = 0; i < std::min(snapshots->size(), max_snapshots); ++i) {
        const auto& id = (*snapshots)[i].id;
        const bool is_clear = std::ranges::count(*snapshots, id, &SnapshotInfo::id) == 1;
        const auto disk = (*image)->snapshots().open(id);
        if (is_clear && succeeded(disk)) take_samples(**disk, id, metadata, samples);
    }
    return samples;
}

void require_readable(const std::shared_ptr<WritableStorage>& file, const std::vector<Sample>& samples) {
    if (samples.empty()) return;
    const auto image = open_alone(file);
    QCOW_REQUIRE(succeeded(image));
    for (const auto& sample : samples) {
        std::shared_ptr<Disk> disk = *image;
        if (!sample.snapshot.empty()) {
            const auto snapshot = (*image)->snapshots().open(sample.snapshot);
            QCOW_REQUIRE(succeeded(snapshot));
            disk = *snapshot;
        }
        std::vector<std::byte> bytes(sample.bytes.size());
        QCOW_REQUIRE(succeeded(disk->read(sample.at, bytes)));
        QCOW_REQUIRE(bytes == sample.bytes);
    }
}

/// Repairs a copy. What could be read before can be read afterwards. A second repair finds nothing more to do.
void exercise_repair(const SparseFile& file) {
    const auto storage = std::make_shared<WritableStorage>(file, "dir/file0");
    const auto samples = samples_of(storage);
    RepairOptions options;
    options.workers = 1;
    options.max_findings = 8;
    options.memory_bytes = MiB;
    const auto repaired = qcow2::repair_image(storage, nullptr, options);
    require_readable(storage, samples);
    if (!succeeded(repaired)) return;
    const auto again = qcow2::repair_image(storage, nullptr, options);
    if (!succeeded(again)) return;
    QCOW_REQUIRE(!again->changed);
    QCOW_REQUIRE(again->before.clean() == repaired->after.clean());
}

/// Hands out the other files of the input one after the other, whatever they are called.
class Shelf {
public:
    explicit Shelf(std::vector<SparseFile> files) {
        for (auto& file : files)
            storages_.push_back(storage_of(std::move(file), "dir/file" + std::to_string(storages_.size())));
    }

    [[nodiscard]] const std::shared_ptr<Storage>& first() const { return storages_.front(); }

    [[nodiscard]] Gate gate() const {
        return [this,
                next = std::size_t{1}](const FileReference& reference) mutable -> Result<std::shared_ptr<Storage>> {
            QCOW_REQUIRE(!reference.location.path.empty() && reference.location.path.find('\0') == std::string::npos);
            QCOW_REQUIRE(!reference.writable && !reference.name.empty() && !reference.named_by.empty());
            if (next >= storages_.size()) return no_files()(reference);
            return storages_[next++];
        };
    }

private:
    std::vector<std::shared_ptr<Storage>> storages_;
};

Result<std::shared_ptr<Image>> open(const Shelf& shelf, std::optional<Format> format, Gate gate, bool follow) {
    OpenOptions options;
    options.format = format;
    options.gate = std::move(gate);
    options.follow = follow;
    options.cache_bytes = 64 * KiB;
    return open_image(shelf.first(), options);
}

}  // namespace

void run_image_input(std::span<const std::byte> input) {
    auto files = parse_files(input);
    exercise_repair(files.front());
    const Shelf shelf(std::move(files));
    const auto probed = open(shelf, std::nullopt, no_files(), true);
    if (succeeded(probed)) exercise(**probed);
    for (const auto format : {Format::raw, Format::qcow, Format::qcow2}) {
        const auto opened = open(shelf, format, no_files(), true);
        if (succeeded(opened) && (!probed || (*probed)->format() != format)) exercise(**opened);
    }
    // Only an image that names other files is another one with them.
    if (probed || probed.error().code != Errc::refused_by_policy) return;
    for (const bool follow : {false, true}) {
        const auto opened = open(shelf, std::nullopt, shelf.gate(), follow);
        if (succeeded(opened)) exercise(**opened);
    }
}

}  // namespace qcow::fuzz
