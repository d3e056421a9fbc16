// qcow convert: the contents of an image into another file.

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <span>

#include "command.h"
#include "create_options.h"
#include "progress.h"
#include "qcow/concat.h"
#include "qcow/copy.h"
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

qcow::Result<void> to_qcow2(qcow::Disk& source, const qcow::NewFile& file, const Options& options,
                            qcow::CopyOptions copy) {
    auto create = parse_create_options(options.image);
    if (!create) return std::unexpected(std::move(create).error());
    const auto refuse = [](std::string place, std::string what) {
        return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, std::move(place), std::move(what)});
    };
    if (!file.starts_as_zeros())
        return refuse(options.target, "a block device can only be the target of -O raw so far");
    if (create->preallocation != qcow::Preallocation::off) {
        return refuse("option preallocation", "only create has it so far");
    }
    if (create->size != 0 && create->size != source.size())
        return refuse("option size", "the target is as large as the source");

    qcow::ConvertOptions convert;
    convert.copy = std::move(copy);
    convert.compress = options.compress;
    convert.level = options.level;
    if (!create->backing_name.empty()) {
        if (create->backing_format.empty()) {
            return refuse("backing file", "its format is to be recorded; say it with -F (raw, qcow or qcow2)");
        }
        Source backing;
        backing.path = beside(options.target, create->backing_name);
        backing.format = create->backing_format;
        backing.untrusted = options.source.untrusted;
        auto image = open_source(backing);
        if (!image) {
            auto error = std::move(image).error();
            return std::unexpected(std::move(error).in("backing file"));
        }
        convert.backing = *std::move(image);
    }
    auto data_file = begin_data_file(options.target, *create);
    if (!data_file) return std::unexpected(std::move(data_file).error());
    const qcow::NewImageFiles files{file.storage(), *data_file ? (*data_file)->storage() : nullptr};
    if (auto converted = qcow::convert_image(source, files, *create, convert); !converted) return converted;
    return *data_file ? (*data_file)->publish(contents_of(options)) : qcow::Result<void>();
}

/// A target that is also read would be gone before it is read. Locks would tell, too, but may have been declined.
qcow::Result<void> verify_target_is_not_read(const std::shared_ptr<qcow::Image>& image, const std::string& target) {
    for (auto layer = image; layer; layer = layer->backing()) {
        for (const auto& path : layer->files()) {
            std::error_code none_there;
            if (std::filesystem::equivalent(path, target, none_there)) {
                return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, target,
                                                   "it is (part of) the source; convert to another name"});
            }
        }
    }
    return {};
}

/// What is converted, as one disk, and the images that it is part of.
struct Sources {
    std::shared_ptr<qcow::Disk> disk;
    std::vector<std::shared_ptr<qcow::Image>> images;
};

qcow::Result<Sources> open_sources(const Options& options) {
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
        if (auto verified = verify_target_is_not_read(*image, options.target); !verified) {
            return std::unexpected(std::move(verified).error());
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
qcow::Result<void> into_existing(const Sources& sources, const Options& options) {
    auto& source = *sources.disk;
    const auto refuse = [&](std::string what) {
        return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, options.target, std::move(what)});
    };
    if (!options.image.options.empty() || !options.image.backing.empty())
        return refuse("with -n it is there already, and stays as it was made: no -o, no -B");
    auto target = open_target(
        {options.target, options.target_format, options.cache, options.source.untrusted, "--target-format"});
    if (!target) return std::unexpected(std::move(target).error());
    for (const auto& file : (*target)->files()) {
        for (const auto& image : sources.images) {
            if (auto verified = verify_target_is_not_read(image, file); !verified) return verified;
        }
    }
    if ((*target)->size() < source.size()) {
        return refuse(
            fmt::format("the disk has {} bytes, and the source {}; see qcow resize", (*target)->size(), source.size()));
    }
    if (options.compress && (*target)->format() != qcow::Format::qcow2)
        return refuse("only qcow2 images have compressed clusters");
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
    if (!copied) return copied;
    return (*target)->close();
}

qcow::Result<int> run(const Options& options) {
    auto sources = open_sources(options);
    if (!sources) return std::unexpected(std::move(sources).error());
    if (options.existing) {
        auto converted = into_existing(*sources, options);
        if (!converted) return std::unexpected(std::move(converted).error());
        return ok;
    }
    const auto& source = sources->disk;

    const bool qcow2_wanted =
        options.compress || options.level || !options.image.options.empty() || !options.image.backing.empty();
    const bool raw = options.target_format.empty() || options.target_format == "raw";
    if (raw && qcow2_wanted) {
        return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, "target format",
                                           "raw has no options and no compression; say -O qcow2"});
    }
    if (options.cache != "writeback" && options.cache != "unsafe") {
        return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, "--cache " + options.cache,
                                           "only with -n; a new file is written to the disk once, at the end"});
    }
    warn_of_ending(options.target, raw ? "raw" : options.target_format, "-O");
    auto file = qcow::NewFile::begin(options.target);
    if (!file) return std::unexpected(std::move(file).error());
    {
        Progress progress("converting", options.progress);
        qcow::CopyOptions copy;
        copy.workers = options.workers;
        copy.progress = [&](std::uint64_t done, std::uint64_t total) { progress.update(done, total); };
        const auto convert = raw ? to_raw : to_qcow2;
        if (auto converted = convert(*source, *file, options, copy); !converted) {
            return std::unexpected(std::move(converted).error());
        }
    }
    if (auto published = file->publish(contents_of(options)); !published)
        return std::unexpected(std::move(published).error());
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
        "The target appears under its name only when it is complete; a file that has the name is replaced then.\n"
        "Zeros take no space. Where source and target share a file system that can, data are shared, not copied.\n" +
            std::string(new_image_help) +
            "\nExamples:\n"
            "  qcow convert disk.qcow2 disk.raw\n"
            "  qcow convert -O qcow2 -c disk.raw disk.qcow2         compressed\n"
            "  qcow convert -O qcow2 -c -o compression_type=zstd disk.raw disk.qcow2\n"
            "  qcow convert -O qcow2 -B base.qcow2 -F qcow2 disk.raw overlay.qcow2    what differs from base\n"
            "  qcow convert -n disk.raw disk.qcow2                  into an image that is there\n"
            "  qcow convert part1.raw part2.raw whole.raw            one behind the other\n"
            "  qcow convert -l before-upgrade disk.qcow2 old.raw    one internal snapshot",
        [options] { return run(*options); });
    // One option for both: CLI11 would give all to SOURCE and leave none for TARGET.
    app.formatter(std::make_shared<SourcesAndTarget>());
    app.add_option("SOURCE", options->paths,
                   "The images, files or block devices, several of them one behind the other; and the file to make, or "
                   "(raw only) a block device to overwrite")
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
