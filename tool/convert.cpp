// qcow convert: the contents of an image into another file.

#include <fmt/format.h>

#include "command.h"
#include "progress.h"
#include "qcow/copy.h"
#include "text.h"

namespace tool {
namespace {

struct Options {
    Source source;
    std::string target;
    std::string target_format = "raw";
    std::string sparse = "4k";
    unsigned workers = 0;
    bool progress = false;
};

qcow::Result<int> run(const Options& options) {
    auto image = open_source(options.source);
    if (!image) return std::unexpected(std::move(image).error());
    auto source = disk_of(*image, options.source);
    if (!source) return std::unexpected(std::move(source).error());

    auto file = qcow::NewFile::begin(options.target);
    if (!file) return std::unexpected(std::move(file).error());
    if (auto sized = file->storage()->resize((*source)->size()); !sized)
        return std::unexpected(std::move(sized).error());
    auto target = qcow::open_image(file->storage(), {.format = qcow::Format::raw});
    if (!target) return std::unexpected(std::move(target).error());
    {
        Progress progress("converting", options.progress);
        qcow::CopyOptions copy;
        copy.workers = options.workers;
        copy.sparse_bytes = parse_size(options.sparse);
        copy.target_is_zero = file->starts_as_zeros();
        copy.progress = [&](std::uint64_t done, std::uint64_t total) { progress.update(done, total); };
        if (auto copied = qcow::copy_disk(**source, **target, copy); !copied)
            return std::unexpected(std::move(copied).error());
    }
    if (auto published = file->publish(); !published) return std::unexpected(std::move(published).error());
    return ok;
}

}  // namespace

void declare_convert(CLI::App& root, int& status) {
    const auto options = std::make_shared<Options>();
    auto& app = declare(
        root, status, "convert", "Get the contents of an image out, as a raw image",
        "The target appears under its name only when it is complete; a file that has the name is replaced then.\n"
        "Zeros become holes. Where source and target share a file system that can, data are shared, not copied.\n"
        "Examples:\n"
        "  qcow convert disk.qcow2 disk.raw\n"
        "  qcow convert -l before-upgrade disk.qcow2 old.raw    one internal snapshot",
        [options] { return run(*options); });
    add_source_options(app, options->source, "SOURCE");
    app.add_option("TARGET", options->target, "The file to make, or a block device to overwrite")->required();
    app.add_option("-O,--target-format", options->target_format, "Format of the target; raw is the only one so far")
        ->check(CLI::IsMember({"raw"}))
        ->capture_default_str();
    app.add_option("-l,--snapshot", options->source.snapshot, "Convert this internal snapshot (id or name)");
    app.add_option("-S,--sparse", options->sparse, "Runs of zeros of at least this size become holes; 0: none do")
        ->check(size_text)
        ->capture_default_str();
    app.add_option("-m,--workers", options->workers, "Threads; by default one a processor")->check(CLI::Range(1, 1024));
    app.add_flag("-p,--progress", options->progress, "Show progress even where standard error is no terminal");
}

}  // namespace tool
