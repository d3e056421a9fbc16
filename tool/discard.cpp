// qcow discard: releases the storage of guest bytes.

#include "command.h"

namespace tool {
namespace {

struct DiscardOptions {
    Target target;
    std::string offset;
    std::string length;
};

qcow::Result<void> discard(qcow::Image& image, const DiscardOptions& options) {
    const auto at = parse_size(options.offset);
    const auto length = parse_size(options.length);
    if (auto fits = verify_range(image, options.target.path, at, length); !fits) return fits;
    return image.discard({at}, length);
}

}  // namespace

void declare_discard(CLI::App& root, int& status) {
    const auto options = std::make_shared<DiscardOptions>();
    auto& app = declare(
        root, status, "discard", "Release the storage of bytes that are no longer needed",
        "Whole clusters in the range become zeros. Other bytes of the range keep their contents. To make all of them\n"
        "zeros, use qcow zero.\n"
        "Version 2 (compat=0.10) cannot mark clusters as zeros. In such an image, clusters keep their contents if the\n"
        "backing file has data for them.\n"
        "Example:\n"
        "  qcow discard disk.qcow2 1G 4G",
        [options] {
            return change(options->target,
                          [&](qcow::Image& image, const std::stop_token&) { return discard(image, *options); });
        });
    add_target_options(app, options->target);
    app.add_option("OFFSET", options->offset, "First byte, as an offset in the virtual disk")
        ->required()
        ->check(size_text);
    app.add_option("LENGTH", options->length, "Number of bytes")->required()->check(size_text);
}

}  // namespace tool
