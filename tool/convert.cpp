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
#include "stream.h"
#include "text.h"
#include "usage.h"

namespace tool {
namespace {

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
    bool progress = false;
};

/// What a new file's contents are when it is given its name.
qcow::NewFile::Contents contents_of(const Options& options) {
    return options.cache == "unsafe" ? qcow::NewFile::Contents::as_they_are : qcow::NewFile::Contents::durable;
}

qcow::Result<void> to_raw(qcow::Disk& source, const qcow::NewFile& file, const Options& options,
                          qcow::CopyOptions copy) {
    if (auto sized = file.storage()->resize(source.size()); !sized) return sized;
    auto target = qcow::open_image(file.storage(), {.writable = true, .format = qcow::Format::raw});
    if (!target) return std::unexpected(std::move(target).error());
    copy.sparse_bytes = parse_size(options.sparse);
    copy.target_is_zero = file.starts_as_zeros();
    return qcow::copy_disk(source, **target, copy);
}

/// What `-o`, `-B` and `-F` say of the image to be made, and the backing file that it is to have.
struct NewImage {
    qcow::CreateOptions create;
    std::shared_ptr<qcow::Image> backing;
};

qcow::Result<NewImage> parse_new_image(const qcow::Disk& source, const Options& options, qcow::FilesInUse& in_use) {
    auto create = parse_create_options(options.image);
    if (!create) return std::unexpected(std::move(create).error());
    const auto refuse = [](std::string place, std::string what) {
        return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, std::move(place), std::move(what)});
    };
    if (create->preallocation != qcow::Preallocation::off) {
        return refuse("option preallocation", "only create has it so far");
    }
    if (create->size != 0 && create->size != source.size())
        return refuse("option size", "the target is as large as the source");
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
        return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, "",
                                           "TARGET is missing; usage: qcow convert [OPTIONS] SOURCE... TARGET"});
    }
    if (paths.size() > 1 && !options.source.snapshot.empty()) {
        return std::unexpected(
            qcow::Error{qcow::Errc::invalid_argument, "option --snapshot", "only a single source can have one"});
    }
    Sources sources;
    std::vector<std::shared_ptr<qcow::Disk>> disks;
    for (const auto& path : paths) {
        Source source = options.source;
        source.path = path;
        auto image = open_source(source);
        if (!image) return std::unexpected(std::move(image).error());
        const auto role = paths.size() == 1 ? "the source" : fmt::format("source {}", sources.images.size() + 1);
        if (auto added = in_use.add(qcow::FilesInUse::Use::read, **image, role); !added) {
            return std::unexpected(std::move(added).error());
        }
        if (source.no_backing) {
            // What it names stays its own, although it is not read.
            auto added = in_use.add_unopened(qcow::FilesInUse::Use::read, source.path, open_options(source), role);
            if (!added) return std::unexpected(std::move(added).error());
        }
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

/// Overwrites an image that is there, of whatever format.
qcow::Result<void> into_existing(const Sources& sources, const Options& options, qcow::FilesInUse& in_use) {
    auto& source = *sources.disk;
    const auto refuse = [&](std::string what) {
        return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, options.target, std::move(what)});
    };
    if (!options.image.options.empty() || !options.image.backing.empty())
        return refuse("with -n it is there already, and stays as it was made: no -o, no -B");
    const Target wanted{options.target, options.target_format, options.cache, options.source.untrusted,
                        "--target-format"};
    // Before it is opened, as to open an image for writing may change it already.
    if (auto added = add_target(in_use, wanted, "the target"); !added) return added;
    auto target = open_target(wanted);
    if (!target) return std::unexpected(std::move(target).error());
    if ((*target)->size() < source.size()) {
        return refuse(
            fmt::format("the disk has {} bytes, and the source {}; see qcow resize", (*target)->size(), source.size()));
    }
    if (options.compress && (*target)->format() != qcow::Format::qcow2)
        return refuse("only qcow2 images have compressed clusters");
    const CleanUpOnSignals clean_up(options.target.c_str());
    Progress progress("converting", options.progress);
    qcow::CopyOptions copy;
    copy.workers = options.workers;
    copy.progress = [&](std::uint64_t done, std::uint64_t total) { progress.update(done, total); };
    copy.target_is_zero = options.target_is_zero;
    // Zeros in a part of a cluster would be written anyway.
    copy.sparse_bytes = parse_size(options.sparse);
    if (copy.sparse_bytes != 0) copy.sparse_bytes = std::max(copy.sparse_bytes, (*target)->block_size());
    auto copied = options.compress ? qcow::copy_compressed(source, **target, copy, options.level)
                                   : qcow::copy_disk(source, **target, copy);
    if (copied) copied = (*target)->close();
    if (!copied) copied.error().what += fmt::format("; {} {}", options.target, holds_a_part);
    return copied;
}

/// Raw data into what can only be written from front to back.
qcow::Result<void> into_stream(qcow::Disk& source, const Options& options, qcow::FilesInUse& in_use) {
    if (options.existing || options.target_format == "qcow2") {
        return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, options.target,
                                           "takes raw data only, as images are not written from front to back; convert "
                                           "into a file, and then: cat FILE"});
    }
    if (auto added = in_use.add(qcow::FilesInUse::Use::written, "/dev/stdout", "standard output"); !added) return added;
    Progress progress("converting", options.progress);
    return stream_to(source, options.target, [&](std::uint64_t done) { progress.update(done, source.size()); });
}

/// Makes the target anew.
qcow::Result<void> into_new(qcow::Disk& source, bool raw, const Options& options, qcow::FilesInUse& in_use) {
    if (options.cache != "writeback" && options.cache != "unsafe") {
        return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, "--cache " + options.cache,
                                           "only with -n; a new file is written to the disk once, at the end"});
    }
    NewImage image;
    if (!raw) {
        auto parsed = parse_new_image(source, options, in_use);
        if (!parsed) return std::unexpected(std::move(parsed).error());
        image = *std::move(parsed);
    }
    NewFilesRequest request{options.target, "the target", {}, contents_of(options)};
    if (!image.create.data_file_name.empty())
        request.data_file_path = beside(options.target, image.create.data_file_name);
    return make_files(request, in_use, [&](const NewFiles& files) {
        warn_of_ending(options.target, raw ? "raw" : options.target_format, "-O");
        Progress progress("converting", options.progress);
        qcow::CopyOptions copy;
        copy.workers = options.workers;
        copy.progress = [&](std::uint64_t done, std::uint64_t total) { progress.update(done, total); };
        return raw ? to_raw(source, files.image, options, copy) : to_qcow2(source, files, image, options, copy);
    });
}

qcow::Result<int> run(const Options& options) {
    qcow::FilesInUse in_use;
    auto sources = open_sources(options, in_use);
    if (!sources) return std::unexpected(std::move(sources).error());
    const bool qcow2_wanted =
        options.compress || options.level || !options.image.options.empty() || !options.image.backing.empty();
    const bool raw = options.target_format.empty() || options.target_format == "raw";
    if (raw && qcow2_wanted && !options.existing) {
        return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, "target format",
                                           "raw has no options and no compression; say -O qcow2"});
    }
    const auto converted = is_stream(options.target) ? into_stream(*sources->disk, options, in_use)
                           : options.existing        ? into_existing(*sources, options, in_use)
                                                     : into_new(*sources->disk, raw, options, in_use);
    if (!converted) return std::unexpected(converted.error());
    return ok;
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
            "\nExamples:\n"
            "  qcow convert disk.qcow2 disk.raw\n"
            "  qcow convert -O qcow2 -c disk.raw disk.qcow2         compressed\n"
            "  qcow convert -O qcow2 -c -o compression_type=zstd disk.raw disk.qcow2\n"
            "  qcow convert -O qcow2 -B base.qcow2 -F qcow2 disk.raw overlay.qcow2    what differs from base\n"
            "  qcow convert -n disk.raw disk.qcow2                  into an image that is there\n"
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
        ->each([options](const std::string& path) { options->target = path; });
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
    app.add_option("-B,--backing", options->image.backing,
                   "Store only what differs from this image, and make it the backing file")
        ->type_name("FILE")
        ->check(name_text);
    add_backing_format_option(app, options->image);
    app.add_option("-S,--sparse", options->sparse,
                   "Raw targets, and -n: runs of zeros of at least this size become holes; 0: none do")
        ->type_name("SIZE")
        ->check(size_text)
        ->capture_default_str();
    auto* existing = app.add_flag("-n,--no-create", options->existing,
                                  "Write into the target, an image that is there already and at least as large");
    app.add_flag("--target-is-zero", options->target_is_zero, "With -n: it reads as zeros, which need not be written")
        ->needs(existing);
    add_cache_option(app, options->cache);
    add_workers_option(app, options->workers);
    app.add_flag("-p,--progress", options->progress, "Show progress even where standard error is no terminal");
}

}  // namespace tool
