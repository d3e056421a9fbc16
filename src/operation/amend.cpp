#include "qcow/amend.h"

#include <fmt/format.h>

#include <bit>
#include <limits>
#include <vector>

#include "base/going_on.h"
#include "base/within_memory.h"
#include "format/header.h"
#include "format/luks.h"
#include "image/gate.h"
#include "luks/volume.h"
#include "operation/new_image.h"
#include "qcow/files_in_use.h"
#include "qcow/text.h"
#include "qcow2/amend.h"
#include "qcow2/metadata/directories.h"
#include "qcow2/qcow2_image.h"

namespace qcow {
namespace {

using enum FilesInUse::Use;

/// Whether the image itself has extents of a kind, in its disk or a snapshot.
Result<bool> has(Image& image, const std::vector<SnapshotInfo>& snapshots, bool (*matches)(const Extent&),
                 bool in_disk) {
    bool found = false;
    const auto look_at = [&](Disk& disk) -> Result<void> {
        for (GuestOffset at; at.value < disk.size() && !found;) {
            const auto extent = TRY(disk.extent(at, disk.size() - at.value));
            found |= extent.depth == 0 && matches(extent);
            at += extent.length;
        }
        return {};
    };
    if (in_disk) TRY_VOID(look_at(image));
    for (const auto& snapshot : snapshots) {
        if (found) break;
        TRY_VOID(look_at(*TRY(image.snapshots().open(snapshot.id))));
    }
    return found;
}

/// Collects all that stands in the way.
class Obstacles {
public:
    Obstacles(Image& image, ImageInfo info, const AmendOptions& options)
        : image_(image),
          info_(std::move(info)),
          options_(options),
          version_(options.version.value_or(info_.version)),
          compression_(info_.compression == "zstd" ? Compression::zstd : Compression::zlib) {}

    Result<void> verify() {
        if (version_ != 2 && version_ != 3) add(fmt::format("compat: there is no version {}", version_));
        verify_refcounts();
        if (options_.size && *options_.size < info_.virtual_size)
            add(fmt::format("size: the disk has {} bytes; qcow resize --shrink makes it smaller", info_.virtual_size));
        if (options_.data_file_name && !info_.data_file) add("data_file: the image has no external data file");
        if (options_.data_file_raw == true && !info_.data_file_raw) {
            add("data_file_raw: only a new image can get this; qcow convert -O qcow2 -o "
                "data_file=FILE,data_file_raw=on makes one");
        }
        TRY_VOID(verify_compression());
        if (version_ == 2) TRY_VOID(verify_version_2());
        if (all_.empty()) return {};
        return fail(Errc::invalid_argument, info_.filename, all_);
    }

private:
    void add(const std::string& what) { all_ += (all_.empty() ? "" : "; ") + what; }

    void verify_refcounts() {
        const unsigned bits = options_.refcount_bits.value_or(info_.refcount_bits);
        if (!std::has_single_bit(bits) || bits > 64)
            add(fmt::format("refcount_bits: {} is not a power of two from 1 to 64", bits));
        if (version_ != 2) return;
        if (bits != 16) add("refcount_bits: version 2 has 16; set it, too, or keep compat=1.1");
        if (options_.lazy_refcounts == true) add("lazy_refcounts: version 2 does not have them");
    }

    Result<void> verify_compression() {
        const auto compression = options_.compression.value_or(compression_);
        if (compression != Compression::zlib && version_ == 2) add("compression_type: version 2 has only zlib");
        if (compression == compression_) return {};
        const auto is_compressed = [](const Extent& extent) { return extent.compressed; };
        if (TRY(has(image_, info_.snapshots, is_compressed, true))) {
            add("compression_type: the image has compressed clusters, which would no longer be readable; qcow convert "
                "-c -O qcow2 -o compression_type=TYPE makes an image of the other type");
        }
        return {};
    }

    Result<void> verify_version_2() {
        if (info_.version == 2) return {};
        if (info_.data_file) add("compat: version 2 has no external data files");
        if (info_.extended_l2) add("compat: version 2 has no extended L2 entries");
        if (!info_.bitmaps.empty() || info_.bitmaps_stale || info_.bitmaps_error)
            add("compat: version 2 has no bitmaps; remove them with qcow bitmap --remove");
        const auto size = options_.size ? rounded_size(*options_.size) : info_.virtual_size;
        for (const auto& snapshot : info_.snapshots) {
            const bool other_size = snapshot.virtual_size != size;
            if (!other_size && snapshot.vm_state_bytes <= std::numeric_limits<std::uint32_t>::max()) continue;
            add(fmt::format(
                "compat: version 2 cannot record that snapshot \"{}\" has {}; remove it with qcow snapshot -d",
                printable(snapshot.name), other_size ? "another size than the disk" : "a VM state of more than 4 GiB"));
        }
        const auto is_zero = [](const Extent& extent) { return extent.kind == Extent::Kind::zero; };
        if (TRY(has(image_, info_.snapshots, is_zero, false)))
            add("compat: snapshots have zero clusters, which version 2 does not have; remove those snapshots");
        return {};
    }

    Image& image_;
    const ImageInfo info_;
    const AmendOptions& options_;
    const unsigned version_;
    const Compression compression_;
    std::string all_;
};

/// The files that the image is to name, as it records them.
struct NewNames {
    std::optional<std::string> backing;
    std::optional<Format> backing_format;
    std::optional<std::string> data_file;
};

Result<Location> location_from(const std::string& name, const AmendJob& job) {
    return parse_location(name, job.image.location.path);
}

/// Adds the backing chain that the image has.
Result<void> add_recorded_backing(FilesInUse& in_use, const AmendJob& job) {
    OpenOptions options;
    options.follow = false;
    options.format = job.image.location.format;
    const auto storage = TRY(open_storage(job.image.location, {.force_share = true}));
    const auto info = TRY(TRY(open_image(storage, options))->info());
    if (!info.backing || info.backing->path.empty()) return {};
    ImageSpec backing{.location = {.path = info.backing->path}};
    backing.location.format = format_from_name(info.backing->format);
    backing.untrusted = job.image.untrusted;
    return in_use.add_unopened(read, backing, "its backing file");
}

/// Verifies that no file gets two roles.
Result<NewNames> new_names(const AmendJob& job) {
    const auto& options = job.options;
    NewNames names;
    FilesInUse in_use;
    if (options.data_file_name) {
        names.data_file = TRY(recorded_name(TRY(parse_location(*options.data_file_name)).path));
        TRY_VOID(in_use.add(written, job.image.location.path, "the image"));
        TRY_VOID(in_use.add(written, TRY(location_from(*names.data_file, job)).path, "its external data file"));
        if (!options.backing_name) TRY_VOID(add_recorded_backing(in_use, job));
    } else {
        TRY_VOID(add_alone(in_use, written, job.image, "the image"));
    }
    if (!options.backing_name && options.backing_format) {
        return fail(Errc::invalid_argument, "backing_fmt",
                    "it is the format of a new backing file; give backing_file, too");
    }
    if (!options.backing_name) return names;
    names.backing = "";
    if (options.backing_name->empty()) return names;
    NewImage recorded{.path = job.image.location.path, .untrusted = job.image.untrusted};
    recorded.options.backing_name = *options.backing_name;
    if (options.backing_format) recorded.options.backing_format = format_name(*options.backing_format);
    recorded = TRY(with_recorded_names(std::move(recorded)));
    const auto backing = TRY(backing_of(recorded));
    TRY_VOID(in_use.add_unopened(read, backing, "its new backing file"));
    names.backing = recorded.options.backing_name;
    names.backing_format = backing.location.format;
    return names;
}

/// How the image is opened: with the data file that it is to name, and with its backing file only if that matters for
/// what changes.
OpenOptions open_options(const AmendJob& job, const NewNames& names, const JobControl& control) {
    OpenOptions open;
    open.writable = true;
    open.write = job.image.write.value_or(WriteOptions());
    open.format = job.image.location.format;
    open.keys = keys_for(job.image);
    open.max_kdf_seconds = job.image.max_kdf_seconds;
    open.follow = job.options.size.has_value() || job.options.version.has_value();
    open.gate = [gate = gate_for(job.image, false), names,
                 &job](FileReference reference) -> Result<std::shared_ptr<Storage>> {
        if (names.data_file && reference.role == FileReference::Role::data_file) {
            reference.name = *names.data_file;
            reference.location = TRY(location_from(*names.data_file, job));
        }
        return gate(reference);
    };
    if (control.warn)
        open.warn = [&](const std::string& message) { control.warn({Warning::Kind::odd_image, message}); };
    return open;
}

/// Where an image has its LUKS header.
struct KeySlots {
    HostOffset at;
    std::uint64_t bytes = 0;
};

/// Also sees to it that they can be changed without harm.
Result<KeySlots> find_key_slots(const std::shared_ptr<Storage>& file, const OpenOptions& open,
                                const JobControl& control) {
    auto examine = open;
    examine.writable = false;
    examine.follow = false;
    examine.keys = {};
    const auto image = TRY(open_image(file, examine));
    if (image->format() == Format::luks) {
        if (TRY(image->info()).encryption->method == "luks2") {
            return fail(Errc::unsupported, file->name(),
                        "its key slots are those of LUKS2; change them with cryptsetup luksAddKey and luksKillSlot");
        }
        std::vector<std::byte> start(format::luks1_header_bytes);
        start.resize(TRY(file->read({0}, start)));
        const auto header = TRY(format::parse_luks1_header(start));
        return KeySlots{{0}, std::uint64_t{header.payload_sector} * format::luks_sector_bytes};
    }
    if (image->format() == Format::qcow2) {
        TRY_VOID(qcow2::prepare_key_slots(file, control));
        const auto header = TRY(format::parse_header(TRY(qcow2::read_first_cluster(*file))));
        if (header.encryption) return KeySlots{header.encryption->offset, header.encryption->length};
    }
    return fail(Errc::invalid_argument, file->name(), "it is not encrypted with LUKS, and has no key slots");
}

Result<void> change_key_slots(const AmendJob& job, const OpenOptions& open, const std::shared_ptr<Storage>& file,
                              const JobControl& control) {
    AmendOptions alone;
    alone.key_slot = job.options.key_slot;
    if (job.options != alone)
        return fail(Errc::invalid_argument, file->name(), "key slots are changed by themselves; leave out the others");
    const auto slots = TRY(find_key_slots(file, open, control));
    const auto& change = *job.options.key_slot;
    std::optional<Secret> existing;
    if (change.new_key) {
        if (!open.keys) return fail(Errc::encrypted, file->name(), "adding a key needs one that the image has");
        const auto seconds = TRY(luks::key_seconds({*file, slots.at, slots.bytes}));
        TRY_VOID(luks::verify_work(*file, seconds, open.max_kdf_seconds));
        existing = TRY(open.keys({.file = file->name(), .method = "luks"}));
    }
    return luks::change_slots(*file, slots.at, slots.bytes, change, existing ? &*existing : nullptr,
                              open.max_kdf_seconds, control);
}

Result<void> run(const AmendJob& job, const JobControl& control) {
    const auto& path = job.image.location.path;
    auto options = job.options;
    const auto names = TRY(new_names(job));
    if (names.data_file) options.data_file_name = names.data_file;
    const auto storage = TRY(open_storage(job.image.location, {.writable = true, .direct = job.image.direct}));
    if (job.options.key_slot) return change_key_slots(job, open_options(job, names, control), storage, control);
    {
        const auto image = TRY(open_image(storage, open_options(job, names, control)));
        if (image->format() != Format::qcow2) return fail(Errc::unsupported, path, "only qcow2 images have options");
        auto info = TRY(image->info());
        if (info.snapshots_error) return std::unexpected(*std::move(info.snapshots_error));
        const auto version = info.version;
        TRY_VOID(Obstacles(*image, std::move(info), options).verify());
        if (options.refcount_bits) TRY_VOID(qcow2::verify_refcounts_fit(storage, *options.refcount_bits, control));
        TRY_VOID(verify_goes_on(control));
        if (options.size) TRY_VOID(image->resize(*options.size));
        if (options.version == 2U && version > 2) TRY_VOID(qcow2::expand_zeroes(*image));
        if (options.version == 3U && version < 3) TRY_VOID(qcow2::complete_snapshots(*image));
        if (names.backing) TRY_VOID(image->change_backing(*names.backing, names.backing_format));
        TRY_VOID(image->close());
    }
    TRY_VOID(verify_goes_on(control));
    return qcow2::amend_header(storage, options, control);
}

}  // namespace

Result<void> amend(const AmendJob& job, const JobControl& control) {
    return within_memory([&] { return run(job, control); });
}

}  // namespace qcow
