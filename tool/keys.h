#pragma once
// Keys of encrypted images: the options that name them, and the prompt.

#include <CLI/CLI.hpp>
#include <memory>
#include <string>
#include <vector>

#include "qcow/key.h"

namespace tool {

/// Adds --object, --key and --key-fd, options of all commands that read or write the contents of images. A process runs
/// one command, so their values are kept once.
void add_key_options(CLI::App& app);

/// Returns a source of keys for the layers of an image. `secrets[i]` is the id of the secret of layer i, as
/// --image-opts gives it; empty or missing: no id is given. Then a layer takes the secret that the name of its file
/// gives, if --object defines it, or the next key of --key and --key-fd, the last of which serves for all further
/// layers, unless it is the key of a new image. Without these, it takes the only secret of --object that -o does not
/// name, or else a person is asked.
qcow::KeySource key_source(std::vector<std::string> secrets = {});

/// Returns the secret with this id, which -o names. From then on it is not taken for the key of an image. Errors:
/// Errc::invalid_argument: --object does not define it; those of reading it.
qcow::Result<std::shared_ptr<const qcow::Secret>> secret_of(const std::string& id);

/// The same for a key that is to open an image from now on. Errors: Errc::invalid_argument, also if it is empty.
qcow::Result<std::shared_ptr<const qcow::Secret>> new_secret_of(const std::string& id);

/// Returns the key of a new image, in the way of key_source, but the last one of --key and --key-fd: images that are
/// read come first. A person is asked twice. `path` names the image. Errors:
/// Errc::invalid_argument if it is empty.
qcow::Result<std::shared_ptr<const qcow::Secret>> new_key(const std::string& path);

/// Warns of values of --key and --key-fd that were not needed, if others were.
void warn_of_unused_keys();

/// Overwrites secrets on the command line, so that lists of processes do not show them.
void hide_secrets(int argc, char** argv);

}  // namespace tool
