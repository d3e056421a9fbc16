#include "qcow/convert.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <memory>

#include "base/within_memory.h"
#include "operation/bitmap_copies.h"
#include "operation/new_image.h"
#include "operation/stream.h"
#include "qcow/concat.h"
#include "qcow/files_in_use.h"
#include "qcow/text.h"
#include "storage/unfinished.h"

namespace qcow {
namespace {

using enum FilesInUse::Use;
using ExistingTarget = ConvertJob::ExistingTarget;
using StreamTarget = ConvertJob::StreamTarget;

std::unexpected<Error> refuse(std::string place, std::string what) {
    return fail(Errc::invalid_argument, std::move(place), std::move(what));
}

std::unexpected<Error> refuse_raw() {
    return refuse("target format", "it has no compression and no backing file; say -O qcow2");
}

/// Refuses a backing file that an existing target does not have.
Result<void> verify_backing(const Image& target, const Location& wanted, const std::string& path) {
    const auto has = target.backing();
    if (!has) return refuse(path, "it has no backing file; leave out -B, which with -n must be the one it has");
    if (wanted.format && *wanted.format != has->format()) {
        return refuse(path, fmt::format("its backing file is {}, not {} as -F says", format_name(has->format()),
                                        format_name(*wanted.format)));
    }
    const auto named = TRY(open_storage(wanted, {.force_share = true}));
    const auto there = TRY(open_file(has->files().front(), {.force_share = true}));
    if (named->identity() == there->identity()) return {};
    return refuse(path, fmt::format("its backing file is {}, and not {}; with -n, -B must be the one it has",
                                    there->name(), named->name()));
}

class Conversion {
public:
    Conversion(const ConvertJob& job, const JobControl& control) : job_(job), warnings_(control.warn) {
        copy_.workers = job.workers;
        copy_.sparse_bytes = job.sparse_bytes;
        copy_.control = control;
        if (job.salvage) copy_.salvage = &losses_;
    }

    Result<ConvertResult> run() {
        TRY_VOID(open_sources());
        ConvertResult result;
        result.path = TRY(std::visit([this](const auto& target) { return into(target); }, job_.target));
        result.bytes = source_->size();
        result.losses = std::move(losses_);
        result.warnings = warnings_.take();
        return result;
    }

private:
    Result<void> open_sources() {
        if (job_.sources.empty()) return refuse("", "there is nothing to convert");
        std::vector<std::shared_ptr<Disk>> disks;
        for (const auto& [spec, snapshot] : job_.sources) {
            auto image = TRY(open_image(spec, warnings_.to()));
            const auto role = job_.sources.size() == 1 ? "the source" : fmt::format("source {}", disks.size() + 1);
            TRY_VOID(in_use_.add(read, *image, spec, role));
            if (job_.bitmaps != ConvertJob::Bitmaps::none) TRY_VOID(plan_bitmaps(image, snapshot));
            disks.push_back(snapshot.empty() ? std::move(image) : TRY(image->snapshots().open(snapshot)));
        }
        source_ = disks.size() == 1 ? std::move(disks[0]) : TRY(concatenate(std::move(disks)));
        return {};
    }

    /// A bitmap that cannot be copied shows before anything is written.
    Result<void> plan_bitmaps(const std::shared_ptr<Image>& source, const std::string& snapshot) {
        if (job_.sources.size() > 1) return refuse_bitmaps("", "several sources are joined to a new disk");
        if (!snapshot.empty()) return refuse_bitmaps("", "the bitmaps are of the active state, not of a snapshot");
        bitmaps_ = TRY(copies_of_bitmaps(source, job_.bitmaps == ConvertJob::Bitmaps::all_but_broken, warnings_));
        return {};
    }

    /// So does one that an existing target cannot take.
    Result<void> verify_takes_bitmaps(Image& target, const std::string& path) const {
        if (job_.bitmaps == ConvertJob::Bitmaps::none) return {};
        const auto info = TRY(target.info());
        if (info.format != Format::qcow2 || info.version < 3) return refuse_bitmaps(path, only_version_3);
        if (bitmaps_.empty()) return {};
        if (info.virtual_size != source_->size()) {
            return refuse_bitmaps(path, fmt::format("the bitmaps are of a disk of {} bytes, and this one has {}",
                                                    source_->size(), info.virtual_size));
        }
        for (const auto& [name, granularity, in_use, enabled] : info.bitmaps) {
            if (std::ranges::find(bitmaps_, name, &BitmapAction::bitmap) == bitmaps_.end()) continue;
            return refuse(path,
                          fmt::format("it has a bitmap \"{}\" already, which the copy would not replace; remove it "
                                      "with qcow bitmap --remove, or leave out --bitmaps",
                                      printable(name)));
        }
        return {};
    }

    static constexpr const char* only_version_3 = "only qcow2 images of version 3 have bitmaps";

    static std::unexpected<Error> refuse_bitmaps(std::string place, const std::string& why) {
        return refuse(std::move(place), why + "; leave out --bitmaps");
    }

    Result<void> add_bitmaps(const NewImageFiles& files, const std::optional<EncryptionOptions>& encryption) {
        if (bitmaps_.empty()) return {};
        const Gate data_file = [&](const FileReference&) -> Result<std::shared_ptr<Storage>> {
            return files.data_file;
        };
        OpenOptions open{.writable = true, .format = Format::qcow2, .gate = data_file, .follow = false};
        if (encryption) {
            open.keys = [&](const KeyRequest&) { return Secret(encryption->key->bytes()); };
            open.max_kdf_seconds = std::numeric_limits<double>::infinity();  // the caller has said how long it takes
        }
        const auto image = TRY(open_image(files.image, open));
        TRY_VOID(image->change_bitmaps(bitmaps_));
        return image->close();
    }

    /// Without a header, an incomplete image in a device is not taken for one that is complete.
    Result<void> add_bitmaps_or_nothing(const NewImageFiles& files,
                                        const std::optional<EncryptionOptions>& encryption) {
        auto added = add_bitmaps(files, encryption);
        if (!added) static_cast<void>(files.image->write_zeroes({0}, sector_bytes));
        return added;
    }

    /// Makes the target. Returns its path, as the others do.
    Result<std::string> into(const NewImage& named) {
        const auto target = TRY(with_recorded_names(named));
        const auto& options = target.options;
        const bool raw = target.format != Format::qcow2;
        if (raw && (job_.compress || job_.level || !options.backing_name.empty())) return refuse_raw();
        if (job_.bitmaps != ConvertJob::Bitmaps::none && (raw || options.version < 3)) {
            return refuse_bitmaps("target format", only_version_3);
        }
        ConvertOptions convert{.copy = copy_, .compress = job_.compress, .level = job_.level};
        if (!options.backing_name.empty()) {
            auto backing = open_image(TRY(backing_of(target)), warnings_.to());
            if (!backing) return std::unexpected(std::move(backing).error().in("backing file"));
            TRY_VOID(in_use_.add(read, **backing, "its backing file"));
            convert.backing = *std::move(backing);
        }
        TRY_VOID(make_files(
            target, "the target", in_use_, warnings_,
            [&](const NewImageFiles& files, bool starts_as_zeros) -> Result<void> {
                if (!raw) {
                    TRY_VOID(convert_image(*source_, files, options, convert));
                    return add_bitmaps_or_nothing(files, options.encryption);
                }
                if (target.format == Format::luks)
                    return convert_luks_image(*source_, files.image, options, convert.copy);
                convert.copy.target_is_zero = starts_as_zeros;
                return convert_raw_image(*source_, files.image, options, convert.copy);
            }));
        return target.path;
    }

    /// Overwrites an image that is there, of whatever format.
    Result<std::string> into(const ExistingTarget& target) {
        if (target.reads_as_zeros && target.backing) {
            return refuse("--target-is-zero", "a target with a backing file (-B) reads as that and not as zeros");
        }
        auto spec = target.image;
        if (!spec.write) spec.write.emplace();
        const auto& path = spec.location.path;
        // Before it is opened, as to open an image for writing may change it already.
        TRY_VOID(in_use_.add_unopened(written, spec, "the target"));
        const auto image = TRY(open_image(spec, warnings_.to()));
        if (image->size() < source_->size()) {
            return refuse(path, fmt::format("the disk has {} bytes, and the source {}; see qcow resize", image->size(),
                                            source_->size()));
        }
        if (job_.compress && image->format() != Format::qcow2)
            return refuse(path, "only qcow2 images have compressed clusters");
        TRY_VOID(verify_takes_bitmaps(*image, path));
        auto copy = copy_;
        copy.target_is_zero = target.reads_as_zeros;
        if (target.backing) {
            TRY_VOID(verify_backing(*image, *target.backing, path));
            copy.skip_equal = true;
        }
        // Zeros in a part of a cluster would be written anyway.
        if (copy.sparse_bytes != 0) copy.sparse_bytes = std::max(copy.sparse_bytes, image->block_size());
        const Unfinished listed(path, Incomplete::part_of_source);
        auto copied =
            job_.compress ? copy_compressed(*source_, *image, copy, job_.level) : copy_disk(*source_, *image, copy);
        if (copied && !bitmaps_.empty()) copied = image->change_bitmaps(bitmaps_);
        if (copied) copied = image->close();
        if (copied) return path;
        copied.error().what += fmt::format("; {} holds only a part of the source", path);
        return std::unexpected(std::move(copied).error());
    }

    /// Raw data into what can only be written from front to back.
    Result<std::string> into(const StreamTarget& target) {
        if (job_.compress || job_.level) return refuse_raw();
        if (job_.salvage)
            return refuse(target.path, "takes the data alone; convert into a file with --salvage or --json");
        if (job_.bitmaps != ConvertJob::Bitmaps::none) return refuse_bitmaps(target.path, "raw data have no bitmaps");
        const auto whole_sectors = TRY(concatenate({source_}));
        TRY_VOID(stream_to(*whole_sectors, target.path, in_use_, copy_.control));
        return target.path;
    }

    const ConvertJob& job_;
    Warnings warnings_;
    FilesInUse in_use_;
    CopyOptions copy_;
    Losses losses_;
    std::shared_ptr<Disk> source_;
    std::vector<BitmapAction> bitmaps_;
};

}  // namespace

Result<ConvertResult> convert(const ConvertJob& job, const JobControl& control) {
    return within_memory([&] { return Conversion(job, control).run(); });
}

}  // namespace qcow
