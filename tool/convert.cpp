// qcow convert: the contents of an image into another file.

#include <fmt/format.h>

#include <span>

#include "command.h"
#include "create_options.h"
#include "progress.h"
#include "qcow/convert.h"
#include "qcow/stream.h"
#include "qcow/text.h"
#include "signals.h"
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

/// Makes the target anew.
qcow::Result<qcow::NewImage> new_target(const Options& options) {
    if (options.cache != "writeback" && options.cache != "unsafe")
        return refuse("--cache " + options.cache, "only with -n; a new file is written to the disk once, at the end");
    qcow::NewImage target;
    target.path = options.target;
    target.format = options.target_format == "qcow2" ? qcow::Format::qcow2 : qcow::Format::raw;
    target.options = QCOW_TRY(parse_create_options(options.image));
    target.untrusted = options.source.untrusted;
    if (options.cache == "unsafe") target.contents = qcow::NewFile::Contents::as_they_are;
    return target;
}

/// Overwrites an image that is there, of whatever format. -B says what its backing file is; it is not made so.
qcow::Result<qcow::ConvertJob::ExistingTarget> existing_target(const Options& options) {
    const auto& [made, backing, backing_format] = options.image;
    if (!made.empty()) return refuse(options.target, "with -n it is there already, and stays as it was made: no -o");
    if (backing.empty() && !backing_format.empty())
        return refuse("backing file format", "-F says what the backing file is that -B names");
    qcow::ConvertJob::ExistingTarget target;
    target.image = spec_of(Target{
        options.target, {.path = options.target}, options.target_format, options.cache, options.source.untrusted});
    target.reads_as_zeros = options.target_is_zero;
    if (!backing.empty()) {
        target.backing = QCOW_TRY(qcow::parse_location(backing, options.target));
        target.backing->format = qcow::format_from_name(backing_format);
    }
    return target;
}

/// Raw data into what can only be written from front to back.
qcow::Result<qcow::ConvertJob::StreamTarget> stream_target(const Options& options) {
    if (options.existing || options.target_format == "qcow2" || !options.image.options.empty() ||
        !options.image.backing.empty()) {
        return refuse(options.target,
                      "takes raw data only, as images are not written from front to back; convert into a file, and "
                      "then: cat FILE");
    }
    if (options.json)
        return refuse(options.target, "takes the data alone; convert into a file with --salvage or --json");
    return qcow::ConvertJob::StreamTarget{options.target};
}

qcow::Result<std::vector<qcow::ConvertJob::Source>> sources(const Options& options) {
    const auto paths = std::span(options.paths).first(options.paths.size() - 1);
    if (paths.empty()) return refuse("", "TARGET is missing; usage: qcow convert [OPTIONS] SOURCE... TARGET");
    if (paths.size() > 1 && !options.source.snapshot.empty())
        return refuse("option --snapshot", "only a single source can have one");
    std::vector<qcow::ConvertJob::Source> sources;
    for (const auto& path : paths) {
        Source source = options.source;
        QCOW_TRY_VOID(name_source(source, path));
        QCOW_TRY_VOID(verify_is_not_stdin(source.path));
        sources.push_back({QCOW_TRY(spec_of(source)), source.snapshot});
    }
    return sources;
}

qcow::Result<qcow::ConvertJob> job_of(const Options& options) {
    qcow::ConvertJob job;
    job.sources = QCOW_TRY(sources(options));
    if (qcow::is_stream(options.target)) {
        job.target = QCOW_TRY(stream_target(options));
    } else if (options.existing) {
        job.target = QCOW_TRY(existing_target(options));
    } else {
        job.target = QCOW_TRY(new_target(options));
    }
    job.workers = options.workers;
    job.sparse_bytes = parse_size(options.sparse);
    job.compress = options.compress;
    job.level = options.level;
    job.salvage = options.salvage;
    return job;
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
    const auto job = QCOW_TRY(job_of(options));
    const auto converted = [&] {
        Progress progress("converting", options.progress);
        const CleanUpOnSignals clean_up;
        return qcow::convert(
            job, {.progress = [&](std::uint64_t done, std::uint64_t total) { progress.update(done, total); },
                  .warn = warn_on_stderr(options.existing ? "--target-format" : "-O")});
    }();
    if (!converted) return std::unexpected(converted.error());
    const auto& losses = converted->losses;
    if (losses.bytes != 0) tell_losses(losses, options);
    if (options.json) print_summary(losses, converted->bytes, options);
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
