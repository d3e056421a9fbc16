#include "qcow/build.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <map>
#include <set>

#include "base/bits.h"
#include "base/going_on.h"
#include "base/within_memory.h"
#include "build/identity.h"
#include "build/partition_table.h"
#include "build/source.h"
#include "build/swap.h"
#include "build/volume.h"
#include "operation/new_image.h"
#include "qcow/files_in_use.h"
#include "qcow/text.h"
#include "storage/file.h"

namespace qcow {

std::unexpected<Error> does_not_fit(const Volume& volume, std::uint64_t needed, std::uint64_t there) {
    return fail(Errc::no_space, volume.at("size"),
                fmt::format("No space: the tree needs {} bytes, and there is room for {}", needed, there));
}

std::string place_of(std::string_view key, const FilesystemSpec* spec, const PartitionSpec* partition,
                     const std::string& name) {
    for (const auto wanted : {key, std::string_view()}) {
        const std::initializer_list<const KeyPlaces*> tables = {partition ? &partition->places : nullptr,
                                                                spec ? &spec->places : nullptr};
        for (const auto* places : tables) {
            if (places == nullptr) continue;
            if (const auto found = places->find(wanted); found != places->end())
                return fmt::format("{}: {}", found->second, name);
        }
    }
    return name;
}

namespace {

using Type = FilesystemSpec::Type;
using Table = BuildSpec::Table;

std::unexpected<Error> refuse(std::string place, std::string what) {
    return fail(Errc::invalid_argument, std::move(place), std::move(what));
}

bool is_ext(Type type) { return type == Type::ext2 || type == Type::ext3 || type == Type::ext4; }
bool is_fat(Type type) {
    return type == Type::fat12 || type == Type::fat16 || type == Type::fat32 || type == Type::vfat;
}

/// The size of a block device, in whole sectors; none: it is no block device.
Result<std::optional<std::uint64_t>> size_of_device(const std::string& path, unsigned sector_size) {
    struct stat status = {};
    if (stat(path.c_str(), &status) != 0 || !S_ISBLK(status.st_mode)) return std::nullopt;
    const FileDescriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    const auto end = fd.get() < 0 ? -1 : lseek(fd.get(), 0, SEEK_END);
    if (end < 0) return system_error("cannot tell the size", path, errno);
    return align_down(static_cast<std::uint64_t>(end), sector_size);
}

/// The bytes of a disk.
class DiskContents final : public Contents {
public:
    explicit DiskContents(std::shared_ptr<Disk> disk) : disk_(std::move(disk)) {}
    [[nodiscard]] Disk& disk() const { return *disk_; }
    Result<void> read(std::uint64_t at, std::span<std::byte> to) const override { return disk_->read({at}, to); }

private:
    std::shared_ptr<Disk> disk_;
};

/// A file system, or other contents, of the disk that is built.
struct Part {
    std::string name;     // for messages
    std::string purpose;  // of its UUIDs
    const FilesystemSpec* spec = nullptr;
    const PartitionSpec* partition = nullptr;  // null: the whole disk
    Tree tree = {};
    std::unique_ptr<DiskContents> raw = {};  // of Type::raw
    std::int64_t time = 0;
    std::uint64_t offset = 0;
    std::uint64_t size = 0;

    [[nodiscard]] std::string at(std::string_view key) const { return place_of(key, spec, partition, name); }
};

class Building {
public:
    Building(const BuildJob& job, const JobControl& control)
        : job_(job), spec_(job.spec), control_(control), warnings_(control.warn) {}

    Result<BuildResult> run() {
        TRY_VOID(verify());
        auto target = TRY(with_recorded_names(job_.target));
        std::shared_ptr<Disk> backing;
        if (!target.options.backing_name.empty()) backing = TRY(open_backing(target));
        for (const auto& input : job_.inputs) TRY_VOID(in_use_.add(FilesInUse::Use::read, input, "an input"));
        TRY_VOID(read_sources());
        set_seed();
        const auto size = TRY(place_parts(target.options, backing.get()));
        PlannedDisk disk(size);
        BuildResult result;
        TRY_VOID(write_parts(disk, result));
        if (spec_.table != Table::none || !spec_.boot_code.empty()) TRY_VOID(write_table(disk));
        for (auto& part : parts_) part.tree.forget_files();
        disk.seal();
        TRY_VOID(copy(disk, target, std::move(backing)));
        result.path = target.path;
        result.size = size;
        result.warnings = warnings_.take();
        return result;
    }

private:
    Result<void> verify() {
        const bool raw = job_.target.format == Format::raw;
        if (raw && (job_.compress || job_.level || !job_.target.options.backing_name.empty()))
            return refuse("target format", "raw has no compression and no backing file; say -O qcow2");
        if (spec_.table == Table::none && !spec_.filesystem)
            return refuse("specification", "a disk without partition table wants a file system");
        if (spec_.table != Table::none && spec_.partitions.empty())
            return refuse("specification", "a partition table wants partitions");
        if (spec_.size && *spec_.size % spec_.sector_size != 0)
            return refuse(at("size"),
                          fmt::format("the size of the disk is no multiple of {} bytes", spec_.sector_size));
        return verify_partitions();
    }

    /// The place of an error: a key of the table [image].
    [[nodiscard]] std::string at(std::string_view key) const {
        const auto found = spec_.places.find(key);
        return found == spec_.places.end() ? "specification" : found->second;
    }

    [[nodiscard]] Result<void> verify_partitions() const {
        std::map<Uuid, std::size_t> uuids;
        std::optional<std::size_t> active;
        const auto most = most_partitions(spec_.table);
        for (std::size_t i = 0; i < spec_.partitions.size(); ++i) {
            const auto& partition = spec_.partitions[i];
            const auto place = [&](std::string_view key) {
                return place_of(key, nullptr, &partition, fmt::format("partition {}", i + 1));
            };
            if (i >= most) {
                return refuse(place(""), spec_.table == Table::mbr ? "an MBR has at most four partitions; use gpt"
                                                                   : "a GPT has at most 128 partitions here");
            }
            if (spec_.table == Table::gpt && !is_name_in_gpt(partition.name)) {
                return refuse(place("name"), fmt::format("the name \"{}\" is no UTF-8 of at most 36 characters",
                                                         printable(partition.name, 80)));
            }
            if (partition.uuid) {
                if (spec_.table == Table::mbr)
                    return refuse(place("uuid"), "has a uuid, which an MBR cannot store; it has the uuid of the disk");
                const auto [first, fresh] = uuids.emplace(*partition.uuid, i + 1);
                if (!fresh) return refuse(place("uuid"), fmt::format("has the uuid of partition {}", first->second));
            }
            if (spec_.table != Table::mbr) continue;
            const auto type = partition.type.mbr.value_or(0);
            if (type == 0x05 || type == 0x0f || type == 0x85) {
                return refuse(place("type"),
                              fmt::format("has the type 0x{:02x} of an extended partition, which is not made; "
                                          "use gpt for more than four partitions",
                                          type));
            }
            if (type == 0xee) return refuse(place("type"), "has the type 0xee, which announces a GPT");
            if (!partition.bootable) continue;
            if (active)
                return refuse(place("bootable"), fmt::format("is bootable, as partition {}; an MBR has one", *active));
            active = i + 1;
        }
        return {};
    }

    Result<std::shared_ptr<Disk>> open_backing(const NewImage& target) {
        auto backing = open_image(TRY(backing_of(target)), warnings_.to());
        if (!backing) return std::unexpected(std::move(backing).error().in("backing file"));
        TRY_VOID(in_use_.add(FilesInUse::Use::read, **backing, "its backing file"));
        return *std::move(backing);
    }

    // ---- Sources ----

    Result<void> read_sources() {
        if (spec_.table == Table::none)
            return add_part({.name = "file system", .purpose = "", .spec = &*spec_.filesystem});
        for (const auto& partition : spec_.partitions) {
            const auto number = parts_.size() + 1;
            const auto* filesystem = partition.filesystem ? &*partition.filesystem : nullptr;
            auto name = fmt::format("partition {}", number);
            if (!partition.name.empty()) name += fmt::format(" ({})", printable(partition.name, 80));
            TRY_VOID(add_part({.name = std::move(name),
                               .purpose = fmt::format("{}", number),
                               .spec = filesystem,
                               .partition = &partition}));
        }
        return {};
    }

    /// Disks that hold other files get other UUIDs: a machine may have both.
    void set_seed() {
        seed_ = seed_of(spec_);
        if (!spec_.seed.empty()) return;
        FilesHash hash;
        for (const auto& part : parts_) {
            hash.add(part.tree.root(), true);
            if (part.raw) hash.add(part.raw->disk().size());
        }
        seed_ += fmt::format("{:016x}", hash.value());
    }

    Result<void> add_part(Part part) {
        TRY_VOID(verify_goes_on(control_));
        if (part.spec != nullptr) TRY_VOID(read_source(part));
        parts_.push_back(std::move(part));
        return {};
    }

    Result<void> read_source(Part& part) {
        const auto& spec = *part.spec;
        const SourceContext context{in_use_, warnings_, job_};
        if (spec.type == Type::raw) {
            auto disk = disk_of_source(spec.sources.front(), context);
            if (!disk) return std::unexpected(std::move(disk).error().in(part.at("source")));
            part.raw = std::make_unique<DiskContents>(*std::move(disk));
            return {};
        }
        if (spec.type == Type::swap) {
            part.time = job_.time.value_or(0);
            return {};
        }
        for (std::size_t i = 0; i < spec.sources.size(); ++i) {
            TRY_VOID(verify_goes_on(control_));
            auto layer = tree_of(spec.sources[i], context);
            auto put = layer ? Result<void>() : std::unexpected(std::move(layer).error());
            if (put && spec.sources.size() == 1) {
                part.tree = *std::move(layer);
            } else if (put) {
                put = put_layer(part.tree, *std::move(layer));
            }
            const auto listed = fmt::format("source {}", i + 1);
            const auto* key = spec.places.contains(listed) ? listed.c_str() : "source";
            if (!put) return std::unexpected(std::move(put).error().in(part.at(key)));
        }
        if (spec.root_owns_all) part.tree.each_inode([](TreeInode& inode) { inode.uid = inode.gid = 0; });
        for (const auto& file : spec.files) {
            auto applied = apply_file(part.tree, file);
            if (applied) continue;
            const auto place = file.places.find("");
            return std::unexpected(std::move(applied).error().in(
                place == file.places.end() ? part.name : fmt::format("{}: {}", place->second, part.name)));
        }
        for (const auto& file : spec.files) {
            if (!file.source.empty()) TRY_VOID(in_use_.add(FilesInUse::Use::read, file.source, "a source"));
        }
        return set_times(part);
    }

    Result<void> set_times(Part& part) {
        const auto& latest = job_.time;
        if (const auto& fixed = part.spec->mtime) {
            part.tree.each_inode([&](TreeInode& inode) {
                inode.mtime = *fixed;
                inode.nanoseconds = 0;
            });
            // The time of a single file is more than the one of all files.
            for (const auto& file : part.spec->files) {
                auto* inode = file.mtime ? part.tree.find(file.path) : nullptr;
                if (inode != nullptr) inode->mtime = *file.mtime;
            }
        }
        const auto range = is_ext(part.spec->type) ? TRY(times_of_ext(volume_of(part))) : times_of_fat();
        std::int64_t newest = 0;
        std::uint64_t moved = 0;
        part.tree.each_inode([&](TreeInode& inode) {
            if (latest && inode.mtime >= *latest) {
                inode.mtime = *latest;
                inode.nanoseconds = 0;
            }
            const auto stored = std::clamp(inode.mtime, range.first, range.last);
            if (stored != inode.mtime) {
                moved += inode.mtime == 0 ? 0 : 1;  // 0: the time is not known
                inode.mtime = stored;
                inode.nanoseconds = 0;
            }
            newest = std::max(newest, inode.mtime);
        });
        part.time = latest.value_or(newest);
        if (moved != 0) {
            warnings_.add(
                {Warning::Kind::odd_image,
                 fmt::format("{}: the file system cannot store the times of {} files, and they get the nearest "
                             "ones that it can",
                             part.name, moved)});
        }
        return {};
    }

    // ---- Places ----

    [[nodiscard]] Volume volume_of(Part& part) const {
        return {.spec = *part.spec,
                .tree = part.tree,
                .name = part.name,
                .uuid = part.spec->uuid.value_or(derived_uuid(seed_, "file system" + part.purpose)),
                .hash_seed = derived_uuid(seed_, "hash seed" + part.purpose),
                .time = part.time,
                .partition = part.partition};
    }

    Result<std::uint64_t> fitted_size(Part& part) const {
        const auto& spec = *part.spec;
        if (spec.size) return *spec.size;
        if (spec.type == Type::raw) return divide_up(part.raw->disk().size(), spec_.sector_size) * spec_.sector_size;
        if (is_ext(spec.type)) return fitted_ext(volume_of(part));
        if (is_fat(spec.type)) return fitted_fat(volume_of(part), spec_.sector_size);
        return refuse(part.at("size"), "swap wants a size");
    }

    /// Places the parts. Returns the size of the disk.
    Result<std::uint64_t> place_parts(const CreateOptions& options, const Disk* backing) {
        auto size = spec_.size;
        if (!size && options.size != 0) size = rounded_size(options.size);
        // The backup of a GPT lies at the end of a device.
        if (!size && spec_.table == Table::gpt && job_.target.format == Format::raw)
            size = TRY(size_of_device(job_.target.path, spec_.sector_size));
        // A tree over a base image: what is the same lies at the same place, as far as it can.
        const bool has_size = spec_.filesystem && spec_.filesystem->size;
        if (!size && !has_size && backing != nullptr) size = backing->size();
        if (spec_.table == Table::none) {
            auto& part = parts_.front();
            part.size = size && !has_size ? *size : TRY(fitted_size(part));
            if (size && part.size > *size)
                return refuse(part.at("size"),
                              fmt::format("its size is {} bytes, and the disk has {}", part.size, *size));
            if (part.size % spec_.sector_size != 0)
                return refuse(part.at("size"), fmt::format("its size is no multiple of {} bytes", spec_.sector_size));
            return size.value_or(part.size);
        }
        const auto room = room_of_table(spec_.table, spec_.sector_size);
        auto end = room.start;
        bool last = false;
        for (auto& part : parts_) {
            if (last) return refuse(part.at("offset"), "no partition can follow one that takes the remaining space");
            TRY_VOID(verify_goes_on(control_));
            const auto& partition = *part.partition;
            const auto align = std::max<std::uint64_t>(partition.align, spec_.sector_size);
            part.offset = partition.offset.value_or(divide_up(end, align) * align);
            if (part.offset % spec_.sector_size != 0)
                return refuse(part.at("offset"),
                              fmt::format("its offset is no multiple of {} bytes", spec_.sector_size));
            if (part.offset < end) {
                return refuse(
                    part.at("offset"),
                    fmt::format("its offset {} lies in front of {}, where what is before it ends", part.offset, end));
            }
            last = partition.remaining && size.has_value();
            if (last) {
                const auto usable = *size - std::min(*size, room.end);
                part.size = align_down(usable - std::min(usable, part.offset), spec_.sector_size);
                if (part.size == 0)
                    return fail(Errc::no_space, part.at("size"), "No space: nothing remains of the disk");
            } else if (partition.size) {
                part.size = *partition.size;
            } else if (part.spec != nullptr) {
                const auto unit = std::max<std::uint64_t>(4096, spec_.sector_size);
                part.size = divide_up(TRY(fitted_size(part)), unit) * unit;
            } else {
                return refuse(part.at("size"), "takes the remaining space, and the disk has no size");
            }
            if (part.size % spec_.sector_size != 0)
                return refuse(part.at("size"), fmt::format("its size is no multiple of {} bytes", spec_.sector_size));
            if (part.size > bit(62) || part.offset > bit(62)) return refuse(part.at("offset"), "lies too far behind");
            end = part.offset + part.size;
            if (end > room.limit)
                return refuse(part.at("size"), "it ends behind sector 2^32, which an MBR cannot store; use gpt");
            if (size && end > *size - std::min(*size, room.end)) {
                return fail(Errc::no_space, part.at("size"),
                            fmt::format("No space: it ends at byte {}, and the disk has room up to byte {}", end,
                                        *size - std::min(*size, room.end)));
            }
        }
        if (size) return *size;
        return divide_up(end + room.end, MiB) * MiB;
    }

    // ---- Contents ----

    Result<void> write_parts(PlannedDisk& disk, BuildResult& result) {
        for (auto& part : parts_) {
            TRY_VOID(verify_goes_on(control_));
            const auto filled = part.spec != nullptr ? TRY(write_part(disk, part)) : Filled{};
            result.parts.push_back({.name = part.partition != nullptr ? part.partition->name : std::string(),
                                    .offset = part.offset,
                                    .size = part.size,
                                    .files = filled.files,
                                    .free = filled.free});
        }
        return {};
    }

    Result<Filled> write_part(PlannedDisk& disk, Part& part) const {
        const auto type = part.spec->type;
        const auto volume = volume_of(part);
        if (is_ext(type)) return write_ext(volume, disk, part.offset, part.size);
        if (is_fat(type)) return write_fat(volume, disk, part.offset, part.size, spec_.sector_size);
        if (type == Type::swap) return write_swap(volume, disk, part.offset, part.size);
        auto& source = part.raw->disk();
        if (source.size() > part.size) return does_not_fit(volume, source.size(), part.size);
        TRY_VOID(each_extent(
            source, {0}, source.size(),
            [&](const Extent& extent) -> Result<void> {
                if (extent.kind != Extent::Kind::data) return {};
                const auto begin = align_down(extent.start.value, sector_bytes);
                disk.place({part.offset + begin}, extent.start.value + extent.length - begin, *part.raw, begin);
                return {};
            }));
        return Filled{.free = part.size - source.size()};
    }

    Result<void> write_table(PlannedDisk& disk) {
        std::vector<std::byte> code;
        if (!spec_.boot_code.empty()) {
            const FileDescriptor fd(::open(spec_.boot_code.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
            if (fd.get() < 0) return system_error("cannot open", spec_.boot_code, errno);
            code.resize(boot_code_bytes);
            const auto got = pread(fd.get(), code.data(), code.size(), 0);
            if (got < 0) return system_error("cannot read", spec_.boot_code, errno);
            TRY_VOID(in_use_.add(FilesInUse::Use::read, spec_.boot_code, "the boot code"));
        }
        if (spec_.table == Table::none) return refuse(at("boot_code"), "boot_code wants a partition table");
        std::vector<PlacedPartition> placed;
        for (const auto& part : parts_) {
            const auto& partition = *part.partition;
            placed.push_back({.name = partition.name,
                              .type = partition.type,
                              .uuid = partition.uuid.value_or(derived_uuid(seed_, "partition" + part.purpose)),
                              .bootable = partition.bootable,
                              .start = part.offset,
                              .size = part.size});
        }
        return write_partition_table(disk, spec_.table, spec_.sector_size,
                                     spec_.uuid.value_or(derived_uuid(seed_, "disk")), placed, code);
    }

    Result<void> copy(PlannedDisk& disk, const NewImage& target, std::shared_ptr<Disk> backing) {
        auto options = target.options;
        if (options.size != 0 && options.size < disk.size()) return refuse("option size", "is smaller than the disk");
        return make_files(
            target, "the target", in_use_, warnings_,
            [&](const NewImageFiles& files, bool starts_as_zeros) -> Result<void> {
                CopyOptions copying{.workers = job_.workers, .control = control_};
                if (target.format == Format::raw) {
                    copying.target_is_zero = starts_as_zeros;
                    return convert_raw_image(disk, files.image, options, copying);
                }
                return convert_image(
                    disk, files, options,
                    {.copy = copying, .compress = job_.compress, .level = job_.level, .backing = std::move(backing)});
            });
    }

    const BuildJob& job_;
    const BuildSpec& spec_;
    const JobControl& control_;
    Warnings warnings_;
    FilesInUse in_use_;
    std::string seed_;
    std::vector<Part> parts_;
};

}  // namespace

Result<BuildResult> build(const BuildJob& job, const JobControl& control) {
    return within_memory([&] { return Building(job, control).run(); });
}

}  // namespace qcow
