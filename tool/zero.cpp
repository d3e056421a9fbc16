// qcow zero: makes guest bytes zeros.

#include "command.h"

namespace tool {
namespace {

struct Options {
    Target target;
    std::string offset;
    std::string length;
    bool keep = false;
};

qcow::Result<void> zero(qcow::Image& image, const Options& options) {
    const auto at = parse_size(options.offset);
    const auto length = parse_size(options.length);
    if (auto fits = verify_range(image, options.target.path, at, length); !fits) return fits;
    return image.write_zeroes({at}, length, options.keep ? qcow::Disk::Zeroes::keep : qcow::Disk::Zeroes::release);
}

}  // namespace

void declare_zero(CLI::App& root, int& status) {
    const auto options = std::make_shared<Options>();
    auto& app = declare(
        root, status, "zero", "Make bytes of the virtual disk zeros",
        "Storage that is not needed for them any more is given up, or with --keep stays for what is written next.\n"
        "The zeros are recorded, so that they stay zeros over any backing file; that takes one cluster for each\n"
        "512 MiB (with clusters of 64k). Version 2 (compat=0.10) cannot record them where nothing is stored.\n"
        "Examples:\n"
        "  qcow zero disk.qcow2 0 1M         wipe the partition table and what follows\n"
        "  qcow zero --keep disk.qcow2 1G 4G",
        [options] { return change(options->target, [&](qcow::Image& image) { return zero(image, *options); }); });
    add_target_options(app, options->target);
    app.add_option("OFFSET", options->offset, "Where to begin, in the virtual disk")->required()->check(size_text);
    app.add_option("LENGTH", options->length, "How many bytes")->required()->check(size_text);
    app.add_flag("--keep", options->keep, "Keep the storage that there is");
}

}  // namespace tool
