// qcow resize: changes the virtual size.

#include "qcow/resize.h"
#include "command.h"

namespace tool {
namespace {

struct Options {
    Target target;
    std::string size;
    bool shrink = false;
};

bool is_relative(const std::string& size) { return size.starts_with('+') || size.starts_with('-'); }

/// A size, or a change of the size with a sign in front.
const CLI::Validator new_size_text(
    [](std::string& text) {
        auto size = text.substr(is_relative(text) ? 1 : 0);
        return size_text(size);
    },
    "");

qcow::Result<int> run(const Options& options) {
    using enum qcow::ResizeJob::Change;
    QCOW_TRY_VOID(verify_is_not_stdin(options.target.path));
    const qcow::ResizeJob job{
        .image = spec_of(options.target),
        .change = options.size.starts_with('+')   ? grow
                  : options.size.starts_with('-') ? shrink
                                                  : to,
        .bytes = parse_size(options.size.substr(is_relative(options.size) ? 1 : 0)),
        .shrink = options.shrink ? qcow::Image::Shrink::allow : qcow::Image::Shrink::refuse,
    };
    QCOW_TRY(qcow::resize(job, {.warn = warn_on_stderr()}));
    return ok;
}

}  // namespace

void declare_resize(CLI::App& root, int& status) {
    const auto options = std::make_shared<Options>();
    auto& app = declare(
        root, status, "resize", "Change the virtual size",
        "New bytes read as zeros. Shrinking loses the bytes past the new end, and cuts unused clusters off the file.\n"
        "Bitmaps get the new size, and show no changes in new bytes. Sizes are rounded up to multiples of 512.\n"
        "Examples:\n"
        "  qcow resize disk.qcow2 20G\n"
        "  qcow resize disk.qcow2 +1.5G           1.5 GiB larger\n"
        "  qcow resize --shrink disk.qcow2 -512M  512 MiB smaller",
        [options] { return run(*options); });
    add_target_options(app, options->target);
    app.add_option("SIZE", options->size, "New size, or with + or - in front the change of the size")
        ->required()
        ->check(new_size_text);
    app.add_flag("--shrink", options->shrink, "Allow a smaller size");
}

}  // namespace tool
