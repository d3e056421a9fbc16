// qcow amend: changes the options of an image.

#include "qcow/amend.h"

#include <fmt/format.h>

#include <array>

#include "command.h"
#include "create_options.h"
#include "failure.h"
#include "keys.h"

namespace tool {
namespace {

struct AmendOptions {
    Target target;
    std::vector<std::string> options;
    bool force = false;
};

/// What the options say of key slots; nothing, if they do not.
qcow::Result<std::optional<qcow::KeySlotChange>> key_slot_change(const NewImageOptions& options,
                                                                 const AmendOptions& all) {
    if (!options.has("encrypt.state")) {
        for (const auto* name : {"encrypt.keyslot", "encrypt.new-secret", "encrypt.old-secret", "encrypt.iter-time"}) {
            if (options.has(name))
                return refuse(fmt::format("option {}", name), "say with encrypt.state=active or inactive what to do");
        }
        return std::nullopt;
    }
    const auto& encrypt = options.encrypt;
    const auto refuse_with = [&](const char* name, const char* state) {
        return refuse(fmt::format("option {}", name), fmt::format("it does not belong to encrypt.state={}", state));
    };
    if (encrypt.active && options.has("encrypt.old-secret")) return refuse_with("encrypt.old-secret", "active");
    for (const auto* name : {"encrypt.new-secret", "encrypt.iter-time"})
        if (!encrypt.active && options.has(name)) return refuse_with(name, "inactive");
    qcow::KeySlotChange change;
    change.slot = encrypt.key_slot;
    change.iter_time_ms = encrypt.options.iter_time_ms;
    change.force = all.force;
    if (encrypt.active) {
        if (encrypt.new_secret.empty()) {
            return refuse("option encrypt.new-secret", "the new key is missing; give it as a secret of --object");
        }
        warn_of_iter_time(change.iter_time_ms);
        change.new_key = QCOW_TRY(new_secret_of(encrypt.new_secret));
    } else if (!encrypt.old_secret.empty()) {
        change.old_key = QCOW_TRY(secret_of(encrypt.old_secret));
    }
    return change;
}

qcow::Result<qcow::AmendOptions> amendments(const AmendOptions& all) {
    const auto options = QCOW_TRY(parse_options(all.options));
    const auto refuse = [](const std::string& name, std::string what) {
        return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, "option " + name, std::move(what)});
    };
    for (const auto* name : {"cluster_size", "extended_l2", "preallocation"}) {
        if (options.has(name)) {
            return refuse(name, fmt::format("only a new image can have it; qcow convert -O qcow2 -o {}=VALUE IMAGE NEW "
                                            "makes one",
                                            name));
        }
    }
    for (const auto* name : {"encrypt.format", "encrypt.cipher-alg", "encrypt.cipher-mode", "encrypt.ivgen-alg",
                             "encrypt.ivgen-hash-alg", "encrypt.hash-alg", "encrypt.key-secret"}) {
        if (options.has(name)) {
            return refuse(name,
                          "only a new image can have it; to change key slots, use encrypt.state with --key or "
                          "--object");
        }
    }
    qcow::AmendOptions result;
    result.key_slot = QCOW_TRY(key_slot_change(options, all));
    if (options.has("compat")) result.version = options.version;
    if (options.has("refcount_bits")) result.refcount_bits = options.refcount_bits;
    if (options.has("lazy_refcounts")) result.lazy_refcounts = options.lazy_refcounts;
    if (options.has("size")) result.size = options.size;
    if (options.has("backing_file")) result.backing_name = options.backing_name;
    if (options.has("backing_fmt")) result.backing_format = qcow::format_from_name(options.backing_format);
    if (options.has("compression_type")) result.compression = options.compression;
    if (options.has("data_file")) result.data_file_name = options.data_file_name;
    if (options.has("data_file_raw")) result.data_file_raw = options.data_file_raw;
    return result;
}

qcow::Result<int> run(const AmendOptions& options) {
    QCOW_TRY_VOID(verify_is_not_stdin(options.target.path));
    const qcow::AmendJob job{.image = QCOW_TRY(spec_of(options.target)), .options = QCOW_TRY(amendments(options))};
    const StopOnSignals signals;
    QCOW_TRY_VOID(qcow::amend(job, {.warn = warn_on_stderr(), .stop = signals.token()}));
    return ok;
}

}  // namespace

void declare_amend(CLI::App& root, int& status) {
    const auto options = std::make_shared<AmendOptions>();
    auto& app = declare(
        root, status, "amend", "Change the options of an image",
        "The contents of the disk stay the same, except with backing_file. If amend is interrupted, the image has\n"
        "some of the changes; run it again. Before it changes anything, it names all that stands in the way.\n"
        "Options for -o, as name=value, separated by commas:\n"
        "  compat=1.1|0.10         1.1 makes version 3, 0.10 version 2. Version 2 has no zero clusters: they become\n"
        "                          holes, or data clusters where a backing file would show through\n"
        "  refcount_bits=BITS      a power of two from 1 to 64\n"
        "  lazy_refcounts=on|off   on lets other programs write refcounts late\n"
        "  size=SIZE               a larger size; see qcow resize\n"
        "  backing_file=FILE,backing_fmt=FORMAT\n"
        "                          records another backing file, as qcow rebase -u does: the file need not exist\n"
        "  compression_type=TYPE   zlib or zstd, if the image has no compressed clusters\n"
        "  data_file=NAME          another name of the external data file, which was moved\n"
        "  data_file_raw=off       the external data file need not be a valid raw image\n"
        "Options for -o that change the key slots of an image that is encrypted with LUKS:\n"
        "  encrypt.state=active,encrypt.new-secret=ID[,encrypt.keyslot=0...7][,encrypt.iter-time=MS]\n"
        "                          adds the passphrase of this secret of --object; --key FILE is one that the image "
        "has\n"
        "  encrypt.state=inactive,encrypt.old-secret=ID   or   encrypt.state=inactive,encrypt.keyslot=0...7\n"
        "                          erases the slots that this passphrase opens, or this slot; with both, this slot if\n"
        "                          this passphrase opens it. Run again, it erases what an interruption left\n"
        "Examples:\n"
        "  qcow amend -o compat=1.1 disk.qcow2\n"
        "  qcow amend --key old --object secret,id=n,file=new -o encrypt.state=active,encrypt.new-secret=n disk.qcow2\n"
        "  qcow amend -o compat=0.10,refcount_bits=16 disk.qcow2",
        [options] { return run(*options); });
    add_target_options(app, options->target);
    add_options_option(app, options->options, "Options to change: name=value,... (see below)")->required();
    app.add_flag("--force", options->force,
                 "Replace the passphrase of a key slot that is in use, and erase the last key slots");
}

}  // namespace tool
