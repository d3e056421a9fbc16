// qcow convert: the contents of an image into another file.

#include <fmt/format.h>

#include <algorithm>
#include <span>

#include "command.h"
#include "create_options.h"
#include "new_files.h"
#include "progress.h"
#include "qcow/concat.h"
#include "qcow/copy.h"
#include "qcow/text.h"
#include "stream.h"
#include "text.h"
#include "usage.h"

namespace tool {
namespace {

/// The exit status of a salvage that could not read everything.
constexpr int lost_something = 3;

struct Options {
    Source source;                   // how each of them is opened
    std::vector<std::string> paths;  // of the sources, and then the target's
    std::string target;
    std::string target_format;  // empty: raw, or for a target that exists whatever it is
    bool existing = false;
    bool target_is_zero = false;
    std::string cache = "writeback";
    NewImageArguments image;
    std::string sparse = "4k";
    std::optional<int> level;
    unsigned workers = 0;
    bool compress = false;
    bool salvage = false;
    bool json = false;
    bool progress = false;
};

std::unexpected<qcow::Error> refuse(std::string place, std::string what) {
    return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, std::move(place), std::move(what)});
}

bool is_raw(const Options& options) { return options.target_format.empty() || options.target_format == "raw"; }

/// What a new file's contents are when it is given its name.
qcow::NewFile::Contents contents_of(const Options& options) {
    return options.cache == "unsafe" ? qcow::NewFile::Contents::as_they_are : qcow::NewFile::Contents::durable;
}

/// What `-o`, `-B` and `-F` say of the image to be made, and the backing file that it is to have.
struct NewImage {
    qcow::CreateOptions create;
    std::shared_ptr<qcow::Image> backing;
};

qcow::Result<NewImage> parse_new_image(const Options& options, qcow::FilesInUse& in_use) {
    auto create = parse_create_options(options.image);
    if (!create) return std::unexpected(std::move(create).error());
    NewImage image{*std::move(create), nullptr};
    if (image.create.backing_name.empty()) return image;
    if (image.create.backing_format.empty()) {
        return refuse("backing file", "its format is to be recorded; say it with -F (raw, qcow or qcow2)");
    }
    Source backing;
    backing.path = beside(options.target, image.create.backing_name);
    backing.format = image.create.backing_format;
    backing.untrusted = options.source.untrusted;
    auto opened = open_source(backing);
    if (!opened) {
        auto error = std::move(opened).error();
        return std::unexpected(std::move(error).in("backing file"));
    }
    image.backing = *std::move(opened);
    auto added = in_use.add(qcow::FilesInUse::Use::read, *image.backing, "its backing file");
    if (!added) return std::unexpected(std::move(added).error());
    return image;
}

qcow::Result<void> to_raw(qcow::Disk& source, const qcow::NewFile& file, const NewImage& image,
                          qcow::CopyOptions copy) {
    copy.target_is_zero = file.starts_as_zeros();
    return qcow::convert_raw_image(source, file.storage(), image.create, copy);
}

qcow::Result<void> to_qcow2(qcow::Disk& source, const NewFiles& files, const NewImage& image, const Options& options,
                            qcow::CopyOptions copy) {
    qcow::ConvertOptions convert;
    convert.copy = std::move(copy);
    convert.compress = options.compress;
    convert.level = options.level;
    convert.backing = image.backing;
    return qcow::convert_image(source, files.storages(), image.create, convert);
}

/// What is converted, as one disk, and the images that it is part of.
struct Sources {
    std::shared_ptr<qcow::Disk> disk;
    std::vector<std::shared_ptr<qcow::Image>> images;
};

qcow::Result<Sources> open_sources(const Options& options, qcow::FilesInUse& in_use) {
    const auto paths = std::span(options.paths).first(options.paths.size() - 1);
    if (paths.empty()) {
        return refuse("", "TARGET is missing; usage: qcow convert [OPTIONS] SOURCE... TARGET");
    }
    if (paths.size() > 1 && !options.source.snapshot.empty()) {
        return refuse("option --snapshot", "only a single source can have one");
    }
    Sources sources;
    std::vector<std::shared_ptr<qcow::Disk>> disks;
    for (const auto& path : paths) {
        Source source = options.source;
        if (auto named = name_source(source, path); !named) return std::unexpected(std::move(named).error());
        auto image = open_source(source);
        if (!image) return std::unexpected(std::move(image).error());
        const auto role = paths.size() == 1 ? "the source" : fmt::format("source {}", sources.images.size() + 1);
        if (auto added = add_source(in_use, source, **image, role); !added)
            return std::unexpected(std::move(added).error());
        auto disk = disk_of(*image, source);
        if (!disk) return std::unexpected(std::move(disk).error());
        disks.push_back(*std::move(disk));
        sources.images.push_back(*std::move(image));
    }
    qcow::Result<std::shared_ptr<qcow::Disk>> joined =
        disks.size() == 1 ? disks[0] : qcow::concatenate(std::move(disks));
    if (!joined) return std::unexpected(std::move(joined).error());
    sources.disk = *std::move(joined);
    return sources;
}

/// With -n, -B says what the target's backing file is; it is not made so.
qcow::Result<void> verify_backing_file(const qcow::Image& target, const Options& options) {
    const auto has = target.backing();
    if (!has)
        return refuse(options.target, "it has no backing file; leave out -B, which with -n must be the one it has");
    const auto& format = options.image.backing_format;
    if (!format.empty() && qcow::format_from_name(format) != has->format()) {
        return refuse(options.target, fmt::format("its backing file is {}, not {} as -F says",
                                                  qcow::format_name(has->format()), format));
    }
    const auto wanted = qcow::open_file(beside(options.target, options.image.backing), {.force_share = true});
    if (!wanted) return std::unexpected(wanted.error());
    const auto there = qcow::open_file(has->files().front(), {.force_share = true});
    if (!there) return std::unexpected(there.error());
    if ((*wanted)->identity() == (*there)->identity()) return {};
    return refuse(options.target, fmt::format("its backing file is {}, and not {}; with -n, -B must be the one it has",
                                              has->files().front(), options.image.backing));
}

/// Overwrites an image that is there, of whatever format.
qcow::Result<void> into_existing(const Sources& sources, const Options& options, const qcow::CopyOptions& wanted_copy,
                                 qcow::FilesInUse& in_use) {
    auto& source = *sources.disk;
    auto copy = wanted_copy;
    if (!options.image.options.empty())
        return refuse(options.target, "with -n it is there already, and stays as it was made: no -o");
    if (options.image.backing.empty() && !options.image.backing_format.empty())
        return refuse("backing file format", "-F says what the backing file is that -B names");
    if (options.target_is_zero && !options.image.backing.empty())
        return refuse("--target-is-zero", "a target with a backing file (-B) reads as that and not as zeros");
    const Target wanted{options.target, options.target_format, options.cache, options.source.untrusted,
                        "--target-format"};
    // Before it is opened, as to open an image for writing may change it already.
    if (auto added = add_target(in_use, wanted, "the target"); !added) return added;
    auto target = open_target(wanted);
    if (!target) return std::unexpected(std::move(target).error());
    if ((*target)->size() < source.size()) {
        return refuse(options.target, fmt::format("the disk has {} bytes, and the source {}; see qcow resize",
                                                  (*target)->size(), source.size()));
    }
    if (options.compress && (*target)->format() != qcow::Format::qcow2)
        return refuse(options.target, "only qcow2 images have compressed clusters");
    if (!options.image.backing.empty()) {
        if (auto verified = verify_backing_file(**target, options); !verified) return verified;
        copy.skip_equal = true;
    }
    copy.target_is_zero = options.target_is_zero;
    // Zeros in a part of a cluster would be written anyway.
    if (copy.sparse_bytes != 0) copy.sparse_bytes = std::max(copy.sparse_bytes, (*target)->block_size());
    const CleanUpOnSignals clean_up(options.target.c_str());
    auto copied = options.compress ? qcow::copy_compressed(source, **target, copy, options.level)
                                   : qcow::copy_disk(source, **target, copy);
    if (copied) copied = (*target)->close();
    if (!copied) copied.error().what += fmt::format("; {} {}", options.target, holds_a_part);
    return copied;
}

/// Raw data into what can only be written from front to back.
qcow::Result<void> into_stream(const Sources& sources, const Options& options, const qcow::CopyOptions& copy,
                               qcow::FilesInUse& in_use) {
    if (options.existing || options.target_format == "qcow2" || !options.image.options.empty()) {
        return refuse(options.target,
                      "takes raw data only, as images are not written from front to back; convert into a file, and "
                      "then: cat FILE");
    }
    if (options.salvage || options.json)
        return refuse(options.target, "takes the data alone; convert into a file with --salvage or --json");
    if (auto added = in_use.add(qcow::FilesInUse::Use::written, "/dev/stdout", "standard output"); !added) return added;
    const auto whole_sectors = qcow::concatenate({sources.disk});
    if (!whole_sectors) return std::unexpected(whole_sectors.error());
    return stream_to(**whole_sectors, options.target,
                     [&](std::uint64_t done) { copy.progress(done, (*whole_sectors)->size()); });
}

/// Makes the target anew.
qcow::Result<void> into_new(const Sources& sources, const Options& options, const qcow::CopyOptions& copy,
                            qcow::FilesInUse& in_use) {
    if (options.cache != "writeback" && options.cache != "unsafe")
        return refuse("--cache " + options.cache, "only with -n; a new file is written to the disk once, at the end");
    const bool raw = is_raw(options);
    const auto image = parse_new_image(options, in_use);
    if (!image) return std::unexpected(image.error());
    NewFilesRequest request{options.target, "the target", {}, contents_of(options)};
    if (!image->create.data_file_name.empty())
        request.data_file_path = beside(options.target, image->create.data_file_name);
    return make_files(request, in_use, [&](const NewFiles& files) {
        warn_of_ending(options.target, raw ? "raw" : options.target_format, "-O");
        return raw ? to_raw(*sources.disk, files.image, *image, copy)
                   : to_qcow2(*sources.disk, files, *image, options, copy);
    });
}

std::string_view reason_name(qcow::Errc code) { return code == qcow::Errc::io ? "io" : "corrupt"; }

void print_summary(const qcow::Losses& losses, std::uint64_t size, const Options& options) {
    Json json = {{"target", options.target},
                 {"source-bytes", size},
                 {"lost-bytes", losses.bytes},
                 {"unlisted-lost-bytes", losses.unlisted_bytes},
                 {"lost", Json::array()}};
    for (const auto& [bytes, why] : losses.ranges) {
        json["lost"].push_back({{"start", bytes.start.value},
                                {"length", bytes.length},
                                {"reason", reason_name(why.code)},
                                {"error", why.message()}});
    }
    print_json(json);
}

void tell_losses(const qcow::Losses& losses, const Options& options) {
    for (const auto& [bytes, why] : losses.ranges) {
        complain(fmt::format("lost: guest bytes {:#x} to {:#x} ({}): {}", bytes.start.value,
                             bytes.start.value + bytes.length - 1, human(bytes.length), why.message()));
    }
    if (losses.unlisted_bytes != 0) complain(fmt::format("lost: {} more bytes, not listed", losses.unlisted_bytes));
    complain(fmt::format("{}: {} could not be read, and are zeros there", qcow::printable(options.target),
                         human_exact(losses.bytes)));
}

qcow::Result<int> run(const Options& options) {
    qcow::FilesInUse in_use;
    auto sources = open_sources(options, in_use);
    if (!sources) return std::unexpected(std::move(sources).error());
    if (is_raw(options) && !options.existing && (options.compress || options.level || !options.image.backing.empty()))
        return refuse("target format", "raw has no compression and no backing file; say -O qcow2");
    qcow::Losses losses;
    {
        Progress progress("converting", options.progress);
        qcow::CopyOptions copy;
        copy.workers = options.workers;
        copy.sparse_bytes = parse_size(options.sparse);
        copy.progress = [&](std::uint64_t done, std::uint64_t total) { progress.update(done, total); };
        if (options.salvage) copy.salvage = &losses;
        const auto convert = is_stream(options.target) ? into_stream : options.existing ? into_existing : into_new;
        if (auto converted = convert(*sources, options, copy, in_use); !converted)
            return std::unexpected(std::move(converted).error());
    }
    if (losses.bytes != 0) tell_losses(losses, options);
    if (options.json) print_summary(losses, sources->disk->size(), options);
    return losses.bytes == 0 ? ok : lost_something;
}

/// Help that shows what the one positional option stands for.
class SourcesAndTarget final : public Help {
public:
    std::string make_option_usage(const CLI::Option*) const override { return "SOURCE... TARGET"; }
};

}  // namespace

void declare_convert(CLI::App& root, int& status) {
    const auto options = std::make_shared<Options>();
    auto& app = declare(
        root, status, "convert", "Copy the contents of an image into a new one: raw, or qcow2, compressed or not",
        "The target appears under its name only when it is complete; a file that has the name is replaced then, and\n"
        "its owner, group, permissions and extended attributes stay. One that cannot be replaced is written in place.\n"
        "A file that is read, such as the source or one of its backing files, is never overwritten.\n"
        "Zeros take no space. Where source and target share a file system that can, data are shared, not copied.\n" +
            std::string(new_image_help) +
            "\nExit status: 0 done, 1 failed, 3 done but for what --salvage could not read.\n"
            "Examples:\n"
            "  qcow convert disk.qcow2 disk.raw\n"
            "  qcow convert -O qcow2 -c disk.raw disk.qcow2         compressed\n"
            "  qcow convert -O qcow2 -c -o compression_type=zstd disk.raw disk.qcow2\n"
            "  qcow convert -O qcow2 -B base.qcow2 -F qcow2 disk.raw overlay.qcow2    what differs from base\n"
            "  qcow convert -n disk.raw disk.qcow2                  into an image that is there\n"
            "  qcow convert -n -B base.qcow2 disk.raw overlay.qcow2 into one over base, only what differs\n"
            "  qcow convert --salvage broken.qcow2 saved.raw        what can be read of a damaged image\n"
            "  qcow convert part1.raw part2.raw whole.raw            one behind the other\n"
            "  qcow convert -l before-upgrade disk.qcow2 old.raw    one internal snapshot\n"
            "  qcow convert disk.qcow2 - | gzip > disk.raw.gz       raw data to standard output",
        [options] { return run(*options); });
    // One option for both: CLI11 would give all to SOURCE and leave none for TARGET.
    app.formatter(std::make_shared<SourcesAndTarget>());
    app.add_option("SOURCE", options->paths,
                   "The images, files or block devices, several of them one behind the other; and the file to make, a "
                   "block device to overwrite, or (raw only) a pipe or \"-\", which is standard output")
        ->required()
        ->check(name_text)
        ->option_text("... TARGET")
        ->each([options](const std::string& name) {
            options->target = name;
            path_of_new_file(options->target);  // what cannot be a name cannot be made either
        });
    add_open_options(app, options->source);
    one_of(app.add_option("-O,--target-format", options->target_format,
                          "Format of the target: raw unless said; with -n, it is guessed from the first bytes"),
           {"raw", "qcow2"});
    add_snapshot_option(app, options->source, "Convert this internal snapshot (id or name)");
    auto* compress = app.add_flag("-c,--compress", options->compress, "Compress");
    app.add_option("--level", options->level, "Compression level: 1 (fast) to 9 (small) for zlib, 1 to 19 for zstd")
        ->type_name("NUMBER")
        ->check(whole_number(1, 19))
        ->needs(compress);
    add_new_image_options(app, options->image);
    app.add_option("-B,--target-backing", options->image.backing,
                   "Store only what differs from this image, and make it the backing file; with -n it must be that\n"
                   "already")
        ->type_name("FILE")
        ->check(name_text);
    add_backing_format_option(app, "-F,--target-backing-format", options->image);
    app.add_option("-S,--sparse", options->sparse,
                   "Raw targets, and -n: runs of zeros of at least this size become holes; 0: every byte is written,\n"
                   "to any target, so that all of it has storage")
        ->type_name("SIZE")
        ->check(size_text)
        ->capture_default_str();
    auto* existing = app.add_flag("-n,--no-create", options->existing,
                                  "Write into the target, an image that is there already and at least as large");
    app.add_flag("--target-is-zero", options->target_is_zero, "With -n: it reads as zeros, which need not be written")
        ->needs(existing);
    app.add_flag("--salvage", options->salvage,
                 "Go on past what cannot be read: it becomes zeros, and is listed at the end");
    app.add_flag("--json", options->json, "Print at the end what was lost, as JSON");
    add_cache_option(app, options->cache);
    add_workers_option(app, options->workers);
    app.add_flag("-p,--progress", options->progress, "Show progress even where standard error is no terminal");
}

}  // namespace tool
