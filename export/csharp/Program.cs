// Judges one frame with the ONNX graph of a bundle, by ONNX Runtime on the CPU, without Python:
//
//     dotnet run -- BUNDLE FRAME.rgb HEIGHT WIDTH [CLASS]
//
// The frame is raw RGB: HEIGHT x WIDTH x 3 bytes, as a camera's buffer holds them. The class is a name of the model, or
// an index. Raw score, score and verdict go to standard output as JSON: good, anomalous, or invalid, for a frame that
// cannot be judged. The exit code is 0 on success, and 1 with one line on standard error when there is no answer.

using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Security.Cryptography;
using System.Text.Json;
using Microsoft.ML.OnnxRuntime;
using Microsoft.ML.OnnxRuntime.Tensors;

internal static class Program
{
    private static int Main(string[] arguments)
    {
        if (arguments.Length < 4 || arguments.Length > 5)
        {
            Console.Error.WriteLine("usage: flowad_judge BUNDLE FRAME.rgb HEIGHT WIDTH [CLASS]");
            return 1;
        }
        try
        {
            int height = int.Parse(arguments[2], CultureInfo.InvariantCulture);
            int width = int.Parse(arguments[3], CultureInfo.InvariantCulture);
            string? given = arguments.Length == 5 ? arguments[4] : null;
            Run(arguments[0], File.ReadAllBytes(arguments[1]), height, width, given);
            return 0;
        }
        catch (Exception error)
        {
            Console.Error.WriteLine(error.Message.Split('\n')[0]);
            return 1;
        }
    }

    // Location statistics, for bundles that have some: float32, classes x 2 x height x width of the map.
    private static DenseTensor<float> ReadLocation(string bundle, JsonElement manifest, JsonElement location)
    {
        JsonElement velocity = manifest.GetProperty("model").GetProperty("velocity");
        bool conditional = velocity.GetProperty("use_class_labels").GetBoolean();
        int classes = conditional ? velocity.GetProperty("num_classes").GetInt32() : 1;
        int[] shape = { classes, 2, velocity.GetProperty("height").GetInt32(), velocity.GetProperty("width").GetInt32() };
        byte[] bytes = File.ReadAllBytes(Path.Combine(bundle, location.GetProperty("file").GetString()!));
        var table = new float[shape[0] * shape[1] * shape[2] * shape[3]];
        if (bytes.Length != table.Length * sizeof(float))
        {
            throw new InvalidDataException(bundle + ": location statistics of another size, calibrate the bundle again");
        }
        Buffer.BlockCopy(bytes, 0, table, 0, bytes.Length);
        return new DenseTensor<float>(table, shape);
    }

    private static void Run(string bundle, byte[] pixels, int height, int width, string? given)
    {
        using JsonDocument document = JsonDocument.Parse(File.ReadAllText(Path.Combine(bundle, "manifest.json")));
        JsonElement manifest = document.RootElement;
        if (manifest.GetProperty("schema_version").GetInt32() != 1)
        {
            throw new InvalidDataException(bundle + ": manifest of another schema, expected 1");
        }
        CheckSize(manifest, pixels, height, width);
        (long index, string label) = FindClass(manifest.GetProperty("model"), given);

        var inputs = new List<NamedOnnxValue>
        {
            NamedOnnxValue.CreateFromTensor("frames", new DenseTensor<byte>(pixels, new[] { 1, height, width, 3 })),
        };
        if (given != null)
        {
            var classes = new DenseTensor<long>(new[] { index }, new[] { 1 });
            inputs.Add(NamedOnnxValue.CreateFromTensor("classes", classes));
        }
        if (manifest.TryGetProperty("location", out JsonElement location) && location.ValueKind != JsonValueKind.Null)
        {
            inputs.Add(NamedOnnxValue.CreateFromTensor("location", ReadLocation(bundle, manifest, location)));
        }
        using var session = new InferenceSession(FindGraph(bundle, manifest));
        using var results = session.Run(inputs);
        float[] map = results.First(one => one.Name == "map").AsTensor<float>().ToArray();
        float[] raw = results.First(one => one.Name == "score").AsTensor<float>().ToArray();

        string reason = Doubt(pixels);
        if (reason == "" && !(map.All(float.IsFinite) && raw.All(float.IsFinite)))
        {
            reason = "the map is not finite";
        }
        var answer = new Dictionary<string, object> { ["verdict"] = "invalid", ["reason"] = reason };
        if (raw.All(float.IsFinite)) // JSON has no other numbers
        {
            answer["raw_score"] = raw;
        }
        if (reason == "")
        {
            (float score, bool anomalous) = Decide(manifest, label, raw);
            answer["score"] = score;
            answer["verdict"] = anomalous ? "anomalous" : "good";
        }
        Console.WriteLine(JsonSerializer.Serialize(answer));
    }

    // The graph of the first artefact for ONNX Runtime, once all files of that artefact have the manifest's SHA-256.
    private static string FindGraph(string bundle, JsonElement manifest)
    {
        foreach (JsonProperty artefact in manifest.GetProperty("artefacts").EnumerateObject())
        {
            if (artefact.Value.GetProperty("engine").GetString() != "onnxruntime")
            {
                continue;
            }
            string? graph = null;
            foreach (JsonProperty file in artefact.Value.GetProperty("files").EnumerateObject())
            {
                string path = Path.Combine(bundle, file.Name);
                using FileStream stream = File.OpenRead(path);
                using SHA256 hash = SHA256.Create();
                string found = BitConverter.ToString(hash.ComputeHash(stream)).Replace("-", "").ToLowerInvariant();
                if (found != file.Value.GetString())
                {
                    throw new InvalidDataException(path + ": altered or damaged; copy or export the bundle again");
                }
                graph ??= path; // the first is the one that the engine opens
            }
            return graph ?? throw new InvalidDataException(bundle + ": an artefact without files");
        }
        throw new InvalidDataException(bundle + ": has no ONNX graph; flowad-export make --format onnx");
    }

    private static void CheckSize(JsonElement manifest, byte[] pixels, int height, int width)
    {
        if (height < 16 || width < 16 || pixels.Length != height * width * 3)
        {
            throw new InvalidDataException(
                $"expected {height} x {width} x 3 bytes of at least 16 x 16 pixels, the file has {pixels.Length}");
        }
        JsonElement size = manifest.GetProperty("frame_size");
        if (size.ValueKind != JsonValueKind.Null && (size[0].GetInt32() != height || size[1].GetInt32() != width))
        {
            throw new InvalidDataException($"the bundle takes {size} frames (height, width), got {height}x{width}");
        }
    }

    // The index of the class, and what the calibration calls it: "" for an unconditional model.
    private static (long Index, string Label) FindClass(JsonElement model, string? given)
    {
        JsonElement velocity = model.GetProperty("velocity");
        if (!velocity.GetProperty("use_class_labels").GetBoolean())
        {
            return given == null ? (0, "") : throw new ArgumentException("the model is unconditional: omit the class");
        }
        string[] names = model.GetProperty("class_names").EnumerateArray().Select(one => one.GetString()!).ToArray();
        int count = velocity.GetProperty("num_classes").GetInt32();
        for (int i = 0; i < count; i++)
        {
            string label = names.Length > 0 ? names[i] : i.ToString(CultureInfo.InvariantCulture);
            if (label == given)
            {
                return (i, label);
            }
        }
        throw new ArgumentException(
            given == null ? "the model is conditional: give the class" : $"class {given} is not in the model");
    }

    // Why a frame cannot be judged, "" for one that can; the same rule as flowad_fast/stages/frames.py.
    private static string Doubt(byte[] pixels)
    {
        int low = pixels.Min();
        int high = pixels.Max();
        if (high - low <= 2)
        {
            return high <= 16 ? "the frame is black" : low >= 250 ? "the frame is saturated" : "the frame is uniform";
        }
        return high <= 16 ? "the frame is black" : low >= 240 ? "the frame is saturated" : "";
    }

    // The score, and whether it is above the threshold of the frame's class.
    private static (float Score, bool Anomalous) Decide(JsonElement manifest, string label, float[] raw)
    {
        JsonElement calibration = manifest.GetProperty("calibration");
        if (calibration.ValueKind == JsonValueKind.Null
            || !calibration.GetProperty("classes").TryGetProperty(label, out JsonElement one))
        {
            throw new InvalidDataException(
                "not calibrated, so there is no verdict; flowad-export calibrate BUNDLE GOOD_FOLDER");
        }
        float score = raw[0];
        if (raw.Length == 2) // the aggregate diff+sum, each term relative to its range over good parts
        {
            double sum = 0;
            for (int i = 0; i < 2; i++)
            {
                JsonElement range = one.GetProperty("ranges")[i];
                double low = range.GetProperty("low").GetDouble();
                double width = range.GetProperty("high").GetDouble() - low;
                sum += (raw[i] - low) / Math.Max(width, 1.17549435e-38); // the smallest normal float32
            }
            score = (float)sum;
        }
        return (score, score > one.GetProperty("threshold").GetDouble());
    }
}
