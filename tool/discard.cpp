// qcow discard: gives up the storage of guest bytes that nobody needs.

#include "command.h"

namespace tool {
namespace {

struct Options {
    Target target;
    std::string offset;
    std::string length;
};

qcow::Result<void> discard(qcow::Image& image, const Options& options) {
    const auto at = parse_size(options.offset);
    const auto length = parse_size(options.length);
    if (auto fits = verify_range(image, options.target.path, at, length); !fits) return fits;
    return image.discard({at}, length);
}

}  // namespace

void declare_discard(CLI::App& root, int& status) {
    const auto options = std::make_shared<Options>();
    auto& app = declare(
        root, status, "discard", "Give up the storage of bytes that are no longer needed",
        "Whole clusters in the range become zeros; other bytes of it stay as they are. To make all of\n"
        "them zeros: qcow zero.\n"
        "Version 2 (compat=0.10) cannot mark clusters as zeros: where the backing file has data, which would come to\n"
        "light, all stays as it is.\n"
        "Example:\n"
        "  qcow discard disk.qcow2 1G 4G",
        [options] { return change(options->target, [&](qcow::Image& image) { return discard(image, *options); }); });
    add_target_options(app, options->target);
    app.add_option("OFFSET", options->offset, "Where to begin, in the virtual disk")->required()->check(size_text);
    app.add_option("LENGTH", options->length, "How many bytes")->required()->check(size_text);
}

}  // namespace tool
